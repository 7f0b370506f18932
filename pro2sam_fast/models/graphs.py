"""CUDA graphs: the launches of a function recorded once and replayed as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..ops._backends import capturing, one_line

__all__ = ["GraphCache"]

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")


class GraphCache:
    """A function of tensors of one GPU, without gradient, that runs as a CUDA graph from its second call with their
    shapes on. Results are the caller's: no later call writes to them.

    The first call with some shapes runs as it is, so shapes that come once cost nothing; it also compiles, checks and
    loads the kernels. If recording fails, a warning says so and calls with these shapes run as they are. So do calls
    under autocast or while another graph is being captured.

    Args:
        function: launches work on the current stream and waits for nothing; what it reads besides its arguments stays
            where it is. Gives a tensor or a named tuple of tensors.
        most: graphs that are recorded. Each holds its arguments and results; intermediate results share their memory.
    """

    def __init__(self, function: Callable[..., Result], most: int = 4) -> None:
        self.function = function
        self.most = most
        self._graphs: dict[tuple, Callable[..., Result] | None] = {}

    def __reduce__(self) -> tuple:
        return GraphCache, (self.function, self.most)  # a copy records its own

    def __call__(self, *tensors: Tensor) -> Result:
        if not _recordable(tensors[0]):
            return self.function(*tensors)
        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        if key not in self._graphs:
            if len(self._graphs) < self.most:
                self._graphs[key] = None
            return self.function(*tensors)
        if self._graphs[key] is None:
            self._graphs[key] = self._recorded(tensors)
        return self._graphs[key](*tensors)

    def _recorded(self, tensors: tuple[Tensor, ...]) -> Callable[..., Result]:
        sibling = next((graph for graph in self._graphs.values() if isinstance(graph, _Graph)), None)
        try:
            return _Graph(self.function, tensors, sibling)
        except Exception as error:  # of the driver, the allocator or a library, by what the function calls
            message = f"no CUDA graph could be recorded ({one_line(error)}); launches go one by one"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return self.function


def _recordable(x: Tensor) -> bool:
    return x.is_cuda and not capturing(x.device) and not torch.is_autocast_enabled("cuda")


class _Graph:
    """Calls, also of siblings, may come from any stream, one after the other: graphs share the memory they work in."""

    def __init__(self, function: Callable[..., Result], tensors: tuple[Tensor, ...], sibling: _Graph | None) -> None:
        # the buffers outlive an inference_mode that may be on now
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(tensors[0].device):
            self.inputs = [torch.empty_like(x) for x in tensors]
            self.stream = sibling.stream if sibling else torch.cuda.Stream()
            self.done = sibling.done if sibling else torch.cuda.Event()
            self.graph = torch.cuda.CUDAGraph()
            pool = sibling.graph.pool() if sibling else None
            self._fill(tensors)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function(*self.inputs)
                # waits for the device; other threads may allocate meanwhile
                with torch.cuda.graph(self.graph, pool, self.stream, capture_error_mode="thread_local"):
                    self.output = function(*self.inputs)

    def __call__(self, *tensors: Tensor) -> Result:
        with torch.cuda.device(tensors[0].device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            try:
                self._fill(tensors)
                self.graph.replay()
                if isinstance(self.output, Tensor):
                    return self.output.clone()
                return type(self.output)(*(x.clone() for x in self.output))
            finally:
                self.done.record(stream)

    def _fill(self, tensors: tuple[Tensor, ...]) -> None:
        for own, x in zip(self.inputs, tensors, strict=True):
            own.copy_(x)
