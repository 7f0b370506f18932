"""Our SAM modules against the `segment_anything` package's, with random weights: fp32, relative error below 1e-4."""

import numpy as np
import pytest
import torch

from pro2sam_fast.errors import ConfigError
from pro2sam_fast.models.sam.build import build_sam, build_vit_sam, sam_model_registry, to_segment_anything
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.predictor import encode_image
from pro2sam_fast.transforms import ResizeLongestSide

segment_anything = pytest.importorskip("segment_anything")


@torch.no_grad()
def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def tiny_vit():
    return build_vit_sam(embed_dim=48, depth=1, num_heads=3, global_attn_indexes=(), img_size=96, width=64)


def randomise(sam):
    # parameters that start at zero would hide their own mistakes
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(std=0.2)
    return sam


@pytest.fixture(scope="module")
def vit_b():
    torch.manual_seed(0)
    sam = randomise(build_sam("vit_b"))
    return sam, to_segment_anything(sam)


@pytest.fixture(scope="module")
def embeddings(vit_b):
    """Of one photo, from our encoder and theirs: the only two passes through ViT-B."""
    sam, theirs = vit_b
    photo = np.random.default_rng(0).integers(0, 256, (300, 450, 3), np.uint8)
    transform = ResizeLongestSide(1024)
    ours, size = encode_image(sam, photo, transform)
    assert size == (683, 1024)
    resized = torch.from_numpy(transform.apply_image(photo)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return ours, theirs.image_encoder(theirs.preprocess(resized))


def test_image_embedding(embeddings):
    ours, theirs = embeddings
    assert ours.shape == theirs.shape == (1, 256, 64, 64)
    assert relative_error(ours, theirs) < 1e-4


def prompts(grid=64):
    generator = torch.Generator().manual_seed(1)
    side = 16 * grid
    points = torch.rand(2, 3, 2, generator=generator) * side
    labels = torch.tensor([[1, 0, 1], [1, -1, 0]])
    boxes = torch.rand(2, 2, 2, generator=generator).sort(1).values.flatten(1) * side
    masks = torch.randn(2, 1, 4 * grid, 4 * grid, generator=generator) * 5
    nothing = {"points": None, "boxes": None, "masks": None}
    return {
        "one point": {**nothing, "points": (points[:, :1], labels[:, :1])},
        "points in float64": {**nothing, "points": (points.double() / 3, labels)},
        "box": {**nothing, "boxes": boxes},
        "points and box": {**nothing, "points": (points, labels), "boxes": boxes},
        "mask": {**nothing, "masks": masks},
        "everything": {"points": (points, labels), "boxes": boxes, "masks": masks},
        "nothing": nothing,
    }


def decode(sam, embedding, prompt, multimask_output=True):
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(**prompt)
        pe = sam.prompt_encoder.get_dense_pe()
        return sparse, dense, *sam.mask_decoder(embedding, pe, sparse, dense, multimask_output)


@pytest.mark.parametrize("kind", prompts())
def test_low_resolution_logits_and_iou(vit_b, embeddings, kind):
    prompt = prompts()[kind]
    ours, theirs = (decode(sam, embeddings[1], prompt) for sam in vit_b)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.numel():
            assert relative_error(a, b) < 1e-4


def test_single_mask(vit_b, embeddings):
    prompt = prompts()["one point"]
    ours, theirs = (decode(sam, embeddings[1], prompt, multimask_output=False)[2:] for sam in vit_b)
    assert ours[0].shape == (2, 1, 256, 256) and ours[1].shape == (2, 1)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))


def test_end_to_end_in_fp32(vit_b, embeddings):
    """Every step ours, from the photo to the logits."""
    sam, theirs = vit_b
    prompt = prompts()["points and box"]
    ours, expected = decode(sam, embeddings[0], prompt), decode(theirs, embeddings[1], prompt)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, expected, strict=True))


def test_tokens_before_masks(vit_b, embeddings):
    """The halves of the decoder give what it gives as a whole, for chosen prompts too."""
    sam = vit_b[0]
    sparse, dense, logits, iou = decode(sam, embeddings[1], prompts()["one point"])
    with torch.no_grad():
        decoded = sam.mask_decoder.decode_tokens(embeddings[1], sam.prompt_encoder.get_dense_pe(), sparse, dense[:1])
        assert relative_error(decoded.iou[:, 1:], iou) < 1e-5
        chosen = decoded._replace(mask_tokens=decoded.mask_tokens[1:], image=decoded.image[1:], iou=decoded.iou[1:])
        assert relative_error(sam.mask_decoder.upscale(chosen, slice(1, None)), logits[1:]) < 1e-5


@pytest.mark.parametrize(
    ("name", "entries", "parameters"), [("vit_b", 314, 89.67), ("vit_l", 482, 308.28), ("vit_h", 594, 637.03)]
)
def test_official_names_and_sizes(name, entries, parameters):
    with torch.device("meta"):
        ours = build_sam(name)
        theirs = segment_anything.sam_model_registry[name]()
    state = ours.state_dict()
    assert len(state) == entries
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert list(state) == list(theirs.state_dict())
    assert sum(p.numel() for p in ours.image_encoder.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert sum(p.numel() for p in ours.mask_decoder.parameters()) == 4_058_340
    assert sum(p.numel() for p in ours.prompt_encoder.parameters()) == 6_220
    assert ours.name == name and not ours.training


def test_dense_position_encoding_is_computed_once():
    prompt = tiny_vit().prompt_encoder
    with torch.inference_mode():
        first = prompt.get_dense_pe()
    assert prompt.get_dense_pe() is first and not first.is_inference()
    assert list(prompt.state_dict()) == list(tiny_vit().prompt_encoder.state_dict())
    fresh = tiny_vit().prompt_encoder
    fresh.load_state_dict(prompt.state_dict())
    torch.testing.assert_close(fresh.get_dense_pe(), first, rtol=0, atol=0)
    # other values, in place, replaced or of another dtype, are noticed
    matrix = prompt.pe_layer.positional_encoding_gaussian_matrix
    matrix.mul_(2)
    expected = prompt.pe_layer(prompt.image_embedding_size)[None]
    assert not torch.equal(expected, first) and torch.equal(prompt.get_dense_pe(), expected)
    prompt.load_state_dict(fresh.state_dict())
    assert torch.equal(prompt.get_dense_pe(), first)
    assert prompt.double().get_dense_pe().dtype == torch.float64
    # training may keep it for the backward pass
    layer = torch.nn.Linear(64, 1)
    layer(fresh.get_dense_pe().flatten(2).mT).sum().backward()


def test_registry():
    assert set(sam_model_registry) == {"default", "vit_b", "vit_l", "vit_h", "lite"}
    with torch.device("meta"):
        assert sam_model_registry["vit_l"]().name == "vit_l"
    with pytest.raises(ConfigError, match="Unknown SAM 'vit_x'; choose one of vit_b, vit_l, vit_h, lite"):
        build_sam("vit_x")


def test_to_segment_anything_of_any_size():
    torch.manual_seed(0)
    sam = randomise(
        build_vit_sam(
            embed_dim=48,
            depth=3,
            num_heads=3,
            global_attn_indexes=(1,),
            window_size=5,
            img_size=96,
            width=64,
            decoder_mlp_dim=96,
        )
    )
    theirs = to_segment_anything(sam)
    assert type(theirs).__module__.startswith("segment_anything")
    x = torch.rand(2, 3, 70, 96) * 255
    with torch.no_grad():
        ours, expected = (m.image_encoder(m.preprocess(x)) for m in (sam, theirs))
        assert relative_error(ours, expected) < 1e-5
        for prompt in prompts(6).values():
            pair = (decode(m, expected[:1], prompt) for m in (sam, theirs))
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(*pair, strict=True) if b.numel())
        # copies: the original does not follow
        theirs.mask_decoder.iou_token.weight.zero_()
        assert sam.mask_decoder.iou_token.weight.abs().sum() > 0


def test_to_segment_anything_of_lite():
    torch.manual_seed(0)
    sam = make_sam_lite(img_size=64)
    theirs = to_segment_anything(sam)
    assert theirs.image_encoder is not sam.image_encoder and theirs.image_encoder.img_size == 64
    assert type(theirs.mask_decoder).__module__.startswith("segment_anything")
    photo = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    ours, _ = encode_image(sam, photo, ResizeLongestSide(64))
    with torch.no_grad():
        expected = theirs.image_encoder(theirs.preprocess(torch.from_numpy(photo).permute(2, 0, 1)[None]))
    assert torch.equal(ours, expected)
    for prompt in prompts(4).values():
        pair = (decode(m, expected, prompt) for m in (sam, theirs))
        assert all(relative_error(a, b) < 1e-4 for a, b in zip(*pair, strict=True) if b.numel())


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segment_anything", None)
    with pytest.raises(ConfigError, match="pip install segment-anything"):
        to_segment_anything(build_vit_sam(embed_dim=16, depth=1, num_heads=2, global_attn_indexes=(), img_size=32))
