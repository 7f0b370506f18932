"""The `segment_anything` package as oracle."""

import pytest
import torch

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
