"""The box of a mask as Pro2SAM's (ECCV 2024) released code finds it, written with scikit-image."""

from __future__ import annotations

import numpy as np

__all__ = ["otsu_union"]


def otsu_union(mask: np.ndarray, min_region: int = 100) -> tuple[int, int, int, int]:
    """Half-open box of all regions of at least `min_region` pixels after Otsu and a closing, else the whole frame."""
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops
    from skimage.morphology import closing, footprint_rectangle

    image = mask.astype(np.uint8)
    closed = closing(image > threshold_otsu(image), footprint_rectangle((3, 3)))
    boxes = [region.bbox for region in regionprops(label(closed)) if region.area >= min_region]
    if not boxes:
        return 0, 0, mask.shape[1], mask.shape[0]
    y0, x0, y1, x1 = np.array(boxes).T
    return int(x0.min()), int(y0.min()), int(x1.max()), int(y1.max())
