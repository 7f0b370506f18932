"""PromptDecoder: the mask decoder's results for every kind of prompt, by whichever decoder."""

import copy

import pytest
import torch
from sam_prompts import KINDS, SIDE, prompts, randomised, relative_rms

from pro2sam_fast.models.sam import GridDecoder, PromptDecoder, prompt_decoder
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.ops.decode_sweeps import fast_operands

needs_sweeps = pytest.mark.skipif(fast_operands("cpu", torch.float32) is None, reason="no native sweeps here")


@pytest.fixture(scope="module")
def shared_sam():
    torch.manual_seed(0)
    return randomised(make_sam_lite(img_size=SIDE))


@pytest.fixture
def sam(shared_sam):
    return copy.deepcopy(shared_sam)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 256, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def plain(sam, images, index, prompt, multimask_output=True):
    sparse, dense = sam.prompt_encoder(*prompt)
    pe = sam.prompt_encoder.get_dense_pe()
    return sam.mask_decoder(images[index : index + 1], pe, sparse, dense, multimask_output)


@pytest.fixture
def calls(monkeypatch):
    """How often bases were computed from an embedding."""
    counted, bases = [], GridDecoder.bases

    def count(self, embeddings):
        counted.append(embeddings)
        return bases(self, embeddings)

    monkeypatch.setattr(GridDecoder, "bases", count)
    return counted


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("multimask_output", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "nothing"])
def test_results_are_those_of_the_mask_decoder(sam, images, kind, multimask_output):
    decoder, prompt = PromptDecoder(sam), (None, None, None) if kind == "nothing" else prompts(kind, 5)
    for index in (0, 1):
        expected = plain(sam, images, index, prompt, multimask_output)
        actual = decoder(images, index, *prompt, multimask_output)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and relative_rms(a, b) < 5e-6
        assert kind != "as many points as fit" or same(actual, expected)


@needs_sweeps
@pytest.mark.parametrize("kind", ["one point", "everything"])
def test_a_prompt_does_not_know_the_others(sam, images, kind, monkeypatch):
    points, boxes, masks = prompts(kind, 11)
    decoder = PromptDecoder(sam)
    together = decoder(images, 0, points, boxes, masks, True)
    for i in (0, 7, 10):
        one = (
            (points[0][i : i + 1], points[1][i : i + 1]),
            *(x if x is None else x[i : i + 1] for x in (boxes, masks)),
        )
        assert same(decoder(images, 0, *one, True), [x[i : i + 1] for x in together])
    monkeypatch.setattr("pro2sam_fast.memory.CHUNK_BYTES", 1)
    assert same(decoder(images, 0, points, boxes, masks, True), together)


@needs_sweeps
def test_bases_are_kept_while_the_images_stay(sam, images, calls, monkeypatch):
    decoder, prompt = PromptDecoder(sam), prompts("one point", 1)
    mask = prompts("mask", 1)
    first = decoder(images, 0, *prompt, True)
    decoder(images, 0, *mask, True)
    decoder(images, 1, *prompt, True)
    assert same(first, decoder(images, 0, *prompt, True)) and len(calls) == 2
    decoder.forget()
    assert same(first, decoder(images, 0, *prompt, True)) and len(calls) == 3

    images = images.clone()
    decoder(images, 0, *prompt, True)
    images[0] *= 2
    for a, b in zip(decoder(images, 0, *prompt, True), plain(sam, images, 0, prompt), strict=True):
        assert relative_rms(a, b) < 5e-6
    assert len(calls) == 5

    monkeypatch.setattr(prompt_decoder, "_MOST_BASES", 1)
    for index in (1, 0, 0):
        decoder(images, index, *prompt, True)
    assert len(calls) == 7


def test_weights_may_change(sam, images):
    decoder, prompt = PromptDecoder(sam), prompts("point and mask", 2)
    before = decoder(images, 0, *prompt, True)
    with torch.no_grad():
        sam.prompt_encoder.mask_downscaling[6].weight.mul_(1.5)
        sam.mask_decoder.transformer.layers[1].norm4.bias.add_(0.3)
    after, expected = decoder(images, 0, *prompt, True), plain(sam, images, 0, prompt)
    assert relative_rms(after[0], before[0]) > 1e-2
    assert all(relative_rms(a, b) < 5e-6 for a, b in zip(after, expected, strict=True))


def test_other_models_and_precisions_use_the_mask_decoder(sam, images, calls):
    prompt = prompts("box", 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(PromptDecoder(sam)(images, 0, *prompt, True), plain(sam, images, 0, prompt))
    double = copy.deepcopy(sam).double(), images.double()
    assert same(PromptDecoder(double[0])(double[1], 0, *prompt, True), plain(*double, 0, prompt))
    sam.mask_decoder.output_upscaling[4] = torch.nn.ReLU()
    assert same(PromptDecoder(sam)(images, 0, *prompt, True), plain(sam, images, 0, prompt))
    assert not calls


@needs_sweeps
def test_goes_on_in_halves_where_memory_ends(sam, images, monkeypatch):
    prompt = prompts("one point", 9)
    expected, decode = PromptDecoder(sam)(images, 0, *prompt, True), GridDecoder.decode

    def limited(self, bases, sparse, *others):
        if len(sparse) > 2:
            raise MemoryError
        return decode(self, bases, sparse, *others)

    monkeypatch.setattr(GridDecoder, "decode", limited)
    assert same(expected, PromptDecoder(sam)(images, 0, *prompt, True))
