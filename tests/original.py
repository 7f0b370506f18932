"""The `segment_anything` package as oracle."""

import pytest
import torch

from pro2sam_fast.models.sam.build import build_vit_sam

segment_anything = pytest.importorskip("segment_anything")


def records(sam, image, **options):
    """Records of the original mask generator.

    With one thread it resizes three masks at once with another rounding than with more, so that step gets two.
    """
    resize = sam.postprocess_masks

    def with_two_threads(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return resize(*args)
        finally:
            torch.set_num_threads(threads)

    sam.postprocess_masks = with_two_threads
    try:
        return segment_anything.SamAutomaticMaskGenerator(sam, **options).generate(image)
    finally:
        sam.postprocess_masks = resize


def small_vit_sam():
    """Our SAM in small, with the random weights of seed 0: 128-pixel input, 8 x 8 embedding of width 64."""
    torch.manual_seed(0)
    return build_vit_sam(
        embed_dim=32,
        depth=2,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=3,
        img_size=128,
        width=64,
        decoder_mlp_dim=128,
    )
