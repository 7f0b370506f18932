"""When a value derived from weights has to be computed again."""

from __future__ import annotations

from torch import Tensor

__all__ = ["state_of"]


def state_of(tensor: Tensor | None) -> tuple[int, int]:
    """Changes when the tensor's values are written in place, replaced or moved. Inference tensors count no writes."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
