"""GridDecoder against the mask decoder that it restructures, in float64 and with every kind of prompt."""

import copy

import pytest
import torch
from torch import nn

from pro2sam_fast.errors import ConfigError
from pro2sam_fast.models.sam.build import build_vit_sam
from pro2sam_fast.models.sam.grid_decoder import GridDecoder
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.ops.decode_sweeps import fast_operands
from pro2sam_fast.testing import BackendCase, forced_isa

SIDE = 128
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")


def randomised(sam):
    """Parameters that start at zero or one would hide their own mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sam.mask_decoder.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "_proj.weight" in name:
                p.mul_(2)
            elif "norm" in name or name.startswith("output_upscaling.1"):
                p.add_(noise * 0.2)
            elif name.endswith("bias"):
                p.add_(noise * 0.1)
    return sam


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return randomised(make_sam_lite(img_size=SIDE))


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(2, 256, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=ISAS)
def isa(request):
    problem = BackendCase("cpu", "cpu", request.param).problem
    if problem:
        pytest.skip(problem)
    with forced_isa(request.param):
        yield request.param


def prompts(kind, count, side=SIDE):
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(count, 8, 2, generator=generator) * side
    labels = torch.randint(2, (count, 8), generator=generator)
    boxes = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1) * side
    return {
        "one point": ((points[:, :1], labels[:, :1]), None, None),
        "two points": ((points[:, :2], labels[:, :2]), None, None),
        "many points": ((points, labels), None, None),
        "box": (None, boxes, None),
        "point and box": ((points[:, :1], labels[:, :1]), boxes, None),
    }[kind]


def reference(sam, embeddings, image, prompt, dtype=torch.float64):
    """IoU (G, M) and logits (G, M, 4e, 4e) of the mask decoder, its work done in ``dtype``."""
    sparse, dense = sam.prompt_encoder(*prompt)
    decoder = copy.deepcopy(sam.mask_decoder).to(dtype)
    pe = sam.prompt_encoder.get_dense_pe().to(dtype)
    decoded = [
        decoder.decode_tokens(embeddings[i][None].to(dtype), pe, s[None].to(dtype), dense[:1].to(dtype))
        for i, s in zip(image, sparse, strict=True)
    ]
    return torch.cat([d.iou for d in decoded]), torch.cat([decoder.upscale(d) for d in decoded])


def relative_rms(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


KINDS = ("one point", "two points", "many points", "box", "point and box")
IMAGE = torch.tensor([1, 0, 0, 1])


@torch.no_grad()
def decode(decoder, sam, embeddings, prompt, image=IMAGE):
    bases = decoder.bases(embeddings)
    decoded = decoder.tokens(bases, sam.prompt_encoder(*prompt)[0], image)
    masks = torch.ones_like(decoded.iou, dtype=torch.bool)
    return decoded, decoder.upscale(bases, decoded, masks).unflatten(0, decoded.iou.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_decoder_in_another_order(sam, embeddings, isa, kind):
    prompt = prompts(kind, len(IMAGE))
    with torch.no_grad():
        iou, logits = reference(sam, embeddings, IMAGE, prompt)
    decoded, actual = decode(GridDecoder(sam), sam, embeddings, prompt)
    assert relative_rms(actual, logits) < 2e-6
    assert float((decoded.iou - iou).abs().max()) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_operands_lose_less_than_bfloat16_tensors(sam, embeddings, isa, kind):
    prompt = prompts(kind, len(IMAGE))
    with torch.no_grad():
        iou, logits = reference(sam, embeddings, IMAGE, prompt)
        low_iou, low = reference(sam, embeddings, IMAGE, prompt, torch.bfloat16)
    decoded, actual = decode(GridDecoder(sam, torch.bfloat16), sam, embeddings, prompt)
    assert relative_rms(actual, logits) < min(4e-3, 0.5 * relative_rms(low, logits))
    assert relative_rms(decoded.iou, iou) < 0.5 * relative_rms(low_iou, iou)


def test_official_size():
    """64 x 64 pixels, as in the ViT models."""
    torch.manual_seed(0)
    sam = randomised(make_sam_lite(img_size=1024))
    embeddings, prompt, image = torch.randn(1, 256, 64, 64), prompts("one point", 2, 1024), torch.zeros(2).long()
    with torch.no_grad():
        iou, logits = reference(sam, embeddings, image, prompt)
    for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        decoded, actual = decode(GridDecoder(sam, dtype), sam, embeddings, prompt, image)
        assert relative_rms(actual, logits) < most
        assert relative_rms(decoded.iou, iou) < most


def test_a_small_model():
    torch.manual_seed(0)
    vit = {"embed_dim": 16, "depth": 0, "num_heads": 2, "global_attn_indexes": (), "img_size": 80}
    sam = randomised(build_vit_sam(**vit, width=64, decoder_mlp_dim=64))
    embeddings, prompt = torch.randn(1, 64, 5, 5), prompts("two points", 3, 80)
    with torch.no_grad():
        iou, logits = reference(sam, embeddings, [0, 0, 0], prompt)
    decoded, actual = decode(GridDecoder(sam), sam, embeddings, prompt, None)
    assert relative_rms(actual, logits) < 2e-6 and relative_rms(decoded.iou, iou) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_does_not_know_the_others(sam, embeddings, dtype):
    """Groups, their order, their images and which masks are wanted leave a mask's bits alone."""
    decoder, prompt = GridDecoder(sam, dtype), prompts("one point", 70)
    image = torch.arange(70) % 2
    decoded, logits = decode(decoder, sam, embeddings, prompt, image)
    index = torch.tensor([3, 66, 12, 69])
    bases = decoder.bases(embeddings)
    wanted = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()
    some = decoder.upscale(bases, decoded.select(index), wanted)
    assert torch.equal(some, logits[index][wanted])
    if fast_operands("cpu", dtype) is None:
        return  # plain products round as they like
    shuffled = decode(decoder, sam, embeddings.flip(0), prompt, 1 - image)
    assert torch.equal(shuffled[1], logits) and torch.equal(shuffled[0].iou, decoded.iou)


def test_nobody_wants_anything(sam, embeddings):
    decoder = GridDecoder(sam)
    bases = decoder.bases(embeddings)
    nobody = decoder.tokens(bases, torch.zeros(0, 2, 256))
    assert nobody.iou.shape == (0, 4)
    assert decoder.upscale(bases, nobody, torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 32, 32)
    one = decoder.tokens(bases, torch.zeros(1, 2, 256))
    assert decoder.upscale(bases, one, torch.zeros(1, 4, dtype=torch.bool)).shape == (0, 32, 32)


def test_too_many_tokens(sam, embeddings):
    decoder = GridDecoder(sam)
    with pytest.raises(ConfigError, match="may have 12 tokens, got 13"):
        decoder.tokens(decoder.bases(embeddings), torch.zeros(1, 13, 256))


def test_models_of_another_kind(sam):
    assert GridDecoder.supports(sam)
    other = copy.deepcopy(sam)
    other.mask_decoder.output_upscaling[4] = nn.ReLU()
    assert not GridDecoder.supports(other)
    with pytest.raises(ConfigError, match="GridDecoder needs"):
        GridDecoder(other)
    narrow = build_vit_sam(embed_dim=16, depth=0, num_heads=2, global_attn_indexes=(), img_size=32, width=16)
    assert not GridDecoder.supports(narrow)
