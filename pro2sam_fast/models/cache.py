"""When a value derived from weights has to be computed again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["state_of", "states_of"]


def state_of(tensor: Tensor | None) -> tuple[int, int]:
    """Changes when the tensor's values are written in place, replaced or moved. Inference tensors count no writes."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def states_of(module: nn.Module) -> Iterator[tuple[int, int]]:
    """:func:`state_of` all parameters and buffers."""
    # without the module's own iterators, which take longer than a small encoder
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        yield state_of(tensor)
    for child in module._modules.values():
        yield from states_of(child)
