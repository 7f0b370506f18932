"""The ViT image encoder's inference on a GPU against its modules. Its code runs on the CPU too, with the ops'
references or, with TRITON_INTERPRET=1, their Triton kernels."""

import copy

import pytest
import recorded_graphs
import torch
from torch import nn
from toy_vit import CONFIGS, make

from pro2sam_fast import memory
from pro2sam_fast.models.sam import image_encoder_gpu
from pro2sam_fast.models.sam.image_encoder_gpu import encode
from pro2sam_fast.testing import BackendCase

CONFIGS = {**CONFIGS, "heads of 80": {"img_size": 80, "window_size": 3, "embed_dim": 160, "num_heads": 2}}


def images(encoder, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, encoder.img_size, encoder.img_size, generator=generator)


def in_float64(encoder, x):
    return copy.deepcopy(encoder).double()(x.double()).detach()


def relative_error(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """By default a GPU rounds the operands of convolutions in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    problem = BackendCase(request.param, "cpu").problem
    if problem:
        pytest.skip(problem)
    return request.param


@pytest.mark.parametrize("config", CONFIGS)
def test_same_function(backend, config):
    encoder = make(**CONFIGS[config])
    x = images(encoder)
    expected = in_float64(encoder, x)
    with torch.no_grad():
        ours = encode(encoder, x, torch.float32, backend)
        assert ours.dtype == torch.float32 and relative_error(ours, expected) < 1e-6
        for dtype in (torch.bfloat16, torch.float16):
            ours = encode(encoder, x, dtype, backend)
            with torch.enable_grad(), torch.autocast("cpu", dtype):
                modules = encoder(x).detach()
            assert ours.dtype == torch.float32
            # rounding is random: the same size of error, not the same error
            assert relative_error(ours, expected) < 1.25 * relative_error(modules, expected)


def test_float16_where_the_stream_grows_beyond_it():
    encoder = make(img_size=64, window_size=3)
    with torch.no_grad():
        for block in encoder.blocks:
            block.mlp.lin2.bias.copy_(torch.linspace(-5e4, 5e4, 48))  # each fits float16, two of them don't
    x = images(encoder)
    expected = in_float64(encoder, x)
    with torch.no_grad():
        assert relative_error(encode(encoder, x, torch.float16), expected) < 2e-2
        encoder.half()
        assert not encoder(x.half()).isfinite().all()
        ours = encode(encoder, x.half(), torch.float16)
        assert ours.dtype == torch.float16 and relative_error(ours, expected) < 2e-2


def test_weights_that_change_are_seen():
    encoder = make(img_size=64, window_size=3)
    x = images(encoder)

    def check():
        with torch.no_grad():
            assert relative_error(encode(encoder, x, torch.float16), in_float64(encoder, x)) < 1e-2

    check()
    with torch.no_grad():
        encoder.blocks[0].attn.qkv.weight.mul_(1.5)
    check()
    encoder.load_state_dict({name: value * 1.1 for name, value in encoder.state_dict().items()})
    check()
    encoder.blocks[1].norm1.weight = nn.Parameter(torch.full((48,), 0.5))
    check()
    encoder.blocks[2] = copy.deepcopy(encoder.blocks[0])
    check()
    assert len(image_encoder_gpu._forms[encoder]) == 1
    duplicate = copy.deepcopy(encoder)
    assert duplicate not in image_encoder_gpu._forms


def test_images_do_not_depend_on_their_pass(monkeypatch):
    encoder = make(img_size=64, window_size=3)
    x = images(encoder, 5)
    expected = in_float64(encoder, x)
    calls = []
    run = image_encoder_gpu._Form.run

    def short_of_memory(self, x):
        calls.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return run(self, x)

    monkeypatch.setattr(image_encoder_gpu._Form, "run", short_of_memory)
    monkeypatch.setattr(image_encoder_gpu, "IMAGES_PER_PASS", 4)
    with torch.inference_mode():
        assert relative_error(encode(encoder, x, torch.float32), expected) < 1e-6
    assert calls == [4, 2, 2, 1]
    assert memory.is_out_of_memory(torch.OutOfMemoryError())


def test_dtype_of_products(monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    x, parameter = torch.zeros(1).as_subclass(OnGpu), torch.zeros(1)
    dtype = image_encoder_gpu.compute_dtype
    assert dtype(x, parameter) is None  # with gradient
    with torch.no_grad():
        assert dtype(x, parameter) == torch.float32
        assert dtype(torch.zeros(1), parameter) is None  # not on a GPU
        assert dtype(x.half(), parameter) is None and dtype(x.half(), parameter.half()) == torch.float16
        assert dtype(x.double(), parameter.double()) is None
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
        for wanted in (torch.bfloat16, torch.float16):
            monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, wanted=wanted: wanted)
            assert dtype(x, parameter) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_are_the_same_function(monkeypatch, dtype):
    recorded_graphs.use(monkeypatch)
    encoder = make(img_size=64, window_size=3)
    batches = [images(encoder, 3)[i : i + 2] for i in (0, 1, 0, 1)]
    with torch.inference_mode():
        found = [encode(encoder, x, dtype) for x in batches]
        encoder.cuda_graphs = False
        for ours, x in zip(found, batches, strict=True):
            assert torch.equal(ours, encode(encoder, x, dtype))
    (_, _, cached), = image_encoder_gpu._forms[encoder].values()
    (graph,) = cached._graphs.values()
    assert graph.graph.replays == 3


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_same_function_on_a_gpu(config, dtype):
    encoder = make(**CONFIGS[config])
    x = images(encoder, 3)
    expected = in_float64(encoder, x)
    encoder, x = encoder.cuda(), x.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        modules = encoder(x).detach()
        with torch.inference_mode():
            runs = [encoder(x) for _ in range(3)]  # the last two from a graph
    assert runs[0].dtype == modules.dtype
    assert relative_error(runs[0], expected) < max(1.25 * relative_error(modules, expected), 2e-6)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vit_b_at_1024_on_a_gpu(dtype):
    from pro2sam_fast.models.sam.build import build_sam

    torch.manual_seed(0)
    encoder = build_sam("vit_b").image_encoder.cuda()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(std=0.1)
    x = images(encoder, 2).cuda()
    expected = encoder(x).detach().double().cpu()  # the modules, in float32
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        modules = encoder(x).detach()
        with torch.no_grad():
            ours, again = encoder(x), encoder(x)
            alone = encoder(x[:1])
    limit = 1e-5 if dtype == torch.float32 else 1.25 * relative_error(modules, expected)
    assert relative_error(ours, expected) < limit
    assert torch.equal(ours, again)
    assert relative_error(alone, expected[:1]) < limit


@pytest.mark.cuda
def test_graphs_follow_the_current_stream_and_the_weights():
    encoder = make(img_size=64, window_size=3).cuda()
    x = images(encoder).cuda()
    with torch.no_grad():
        for _ in range(2):
            encoder(x)
        stream, late = torch.cuda.Stream(), torch.zeros_like(x)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            found = encoder(late)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, encoder(x))
        encoder.blocks[0].mlp.lin1.weight.mul_(2)
        changed = encoder(x)
        assert not torch.equal(changed, found)
        assert relative_error(changed, in_float64(encoder.cpu(), x.cpu())) < 1e-5
