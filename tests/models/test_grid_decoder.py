"""GridDecoder against the mask decoder that it restructures, in float64 and with every kind of prompt."""

import copy

import pytest
import torch
from sam_prompts import KINDS, POINTS_AND_BOXES, SIDE, prompts, randomised, relative_rms
from torch import nn

from pro2sam_fast.errors import ConfigError
from pro2sam_fast.models.sam.build import build_vit_sam
from pro2sam_fast.models.sam.grid_decoder import GridDecoder, ImageBases
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.ops.decode_sweeps import fast_operands
from pro2sam_fast.testing import BackendCase, forced_isa

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")


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


def reference(sam, embeddings, image, prompt, dtype=torch.float64):
    """IoU (G, M) and logits (G, M, 4e, 4e) of the mask decoder, its work done in ``dtype``."""
    sparse, dense = sam.prompt_encoder(*prompt)
    decoder = copy.deepcopy(sam.mask_decoder).to(dtype)
    pe = sam.prompt_encoder.get_dense_pe().to(dtype)
    decoded = [
        decoder.decode_tokens(embeddings[i][None].to(dtype), pe, s[None].to(dtype), d[None].to(dtype))
        for i, s, d in zip(image, sparse, dense, strict=True)
    ]
    return torch.cat([d.iou for d in decoded]), torch.cat([decoder.upscale(d) for d in decoded])


IMAGE = torch.tensor([1, 0, 0, 1])


def masked_bases(decoder, bases, embeddings, masks, image):
    parts = [
        decoder.masked_bases(ImageBases(*(x[i : i + 1] for x in bases)), embeddings[i : i + 1], mask[None])
        for i, mask in zip(image.tolist(), masks, strict=True)
    ]
    return ImageBases(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def decode(decoder, sam, embeddings, prompt, image=IMAGE):
    bases, sparse = decoder.bases(embeddings), sam.prompt_encoder(*prompt)[0]
    if prompt[2] is not None:
        bases, image = masked_bases(decoder, bases, embeddings, prompt[2], image), torch.arange(len(image))
    decoded = decoder.tokens(bases, sparse, image)
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
    most = 4e-3 if prompt[2] is None else 5e-3  # bases of a masked image are rounded twice
    assert relative_rms(actual, logits) < min(most, 0.5 * relative_rms(low, logits))
    assert relative_rms(decoded.iou, iou) < 0.5 * relative_rms(low_iou, iou)


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("kind", ["one point", "point and mask"])
def test_official_sizes(side, kind):
    """32 x 32 pixels as in ``lite``, 64 x 64 as in the ViT models."""
    torch.manual_seed(0)
    sam = randomised(make_sam_lite(img_size=side))
    prompt, image = prompts(kind, 2, side), torch.zeros(2).long()
    embeddings = torch.randn(1, 256, side // 16, side // 16)
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


@pytest.mark.parametrize("group", [1, 8])
def test_size_of_groups(sam, embeddings, group):
    prompt = prompts("one point", len(IMAGE))
    decoded, logits = decode(GridDecoder(sam), sam, embeddings, prompt)
    others, other = decode(GridDecoder(sam, prompts_per_group=group), sam, embeddings, prompt)
    assert relative_rms(other, logits) < 2e-6 and relative_rms(others.iou, decoded.iou) < 2e-6


@torch.no_grad()
def test_prompts_of_all_kinds_on_several_images_in_one_call(sam, embeddings):
    decoder, chosen = GridDecoder(sam, prompts_per_group=8), slice(1, None)
    bases = decoder.bases(embeddings)
    image = IMAGE.repeat(len(POINTS_AND_BOXES))
    encoded = [sam.prompt_encoder(*prompts(kind, len(IMAGE)))[0] for kind in POINTS_AND_BOXES]
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
    sparse = [tokens for batch in encoded for tokens in batch]
    together = decoder.decode(bases, [sparse[i] for i in order], image[order], chosen)
    assert [x.shape for x in together] == [(24, 3), (24, 3, SIDE // 4, SIDE // 4)]
    for kind, batch in enumerate(encoded):
        wanted = [int((order == i).nonzero()) for i in range(kind * len(IMAGE), (kind + 1) * len(IMAGE))]
        alone = decoder.decode(bases, batch, IMAGE, chosen)
        reference_iou, reference_logits = reference(sam, embeddings, IMAGE, prompts(POINTS_AND_BOXES[kind], len(IMAGE)))
        assert relative_rms(alone[1], reference_logits[:, chosen]) < 2e-6
        assert relative_rms(alone[0], reference_iou[:, chosen]) < 2e-6
        if fast_operands("cpu", torch.float32) is not None:
            assert all(torch.equal(x[wanted], y) for x, y in zip(together, alone, strict=True))
    assert [x.shape for x in decoder.decode(bases, [])] == [(0, 4), (0, 4, SIDE // 4, SIDE // 4)]


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
    with pytest.raises(ConfigError, match="may have 27 tokens, got 28"):
        decoder.tokens(decoder.bases(embeddings), torch.zeros(1, 28, 256))


def test_models_of_another_kind(sam):
    assert GridDecoder.supports(sam)
    other = copy.deepcopy(sam)
    other.mask_decoder.output_upscaling[4] = nn.ReLU()
    assert not GridDecoder.supports(other)
    with pytest.raises(ConfigError, match="GridDecoder needs"):
        GridDecoder(other)
    narrow = build_vit_sam(embed_dim=16, depth=0, num_heads=2, global_attn_indexes=(), img_size=32, width=16)
    assert not GridDecoder.supports(narrow)
