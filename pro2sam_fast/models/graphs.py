"""CUDA graphs: the launches of a function recorded once and replayed as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["GraphCache"]


class GraphCache:
    """A function of one tensor, without gradient, that runs as a CUDA graph from its second call with a shape on.

    The first call with a shape runs as it is, so a shape that comes once costs nothing; it also compiles and loads the
    kernels. If recording fails, one warning says so and every call runs as it is.

    Args:
        function: launches work on the current stream and waits for nothing; what it reads besides its argument stays
            where it is.
        most: shapes that are recorded; each holds its intermediate results.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], most: int = 4) -> None:
        self.function = function
        self.most = most
        self.enabled = True
        self._graphs: dict[tuple, _Graph | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not self.enabled or not _recordable(x):
            return self.function(x)
        key = x.shape, x.stride(), x.dtype, x.device
        if key not in self._graphs:
            if len(self._graphs) < self.most:
                self._graphs[key] = None
            return self.function(x)
        if self._graphs[key] is None:
            try:
                self._graphs[key] = _Graph(self.function, x)
            except Exception as error:  # of the driver, the allocator or a library, by what the function calls
                self.enabled = False
                self._graphs.clear()
                reason = str(error).partition("\n")[0]
                message = f"no CUDA graph could be recorded ({reason}); launches go one by one"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                return self.function(x)
        return self._graphs[key](x)


def _recordable(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


class _Graph:
    """Calls may come from any stream, one after the other."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        # the buffers outlive an inference_mode that may be on now
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
            self.input = torch.empty_like(x)
            self.input.copy_(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(self.input)
            side.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                self.output = function(self.input)
            self.done = torch.cuda.Event()

    def __call__(self, x: Tensor) -> Tensor:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            self.input.copy_(x)
            self.graph.replay()
            output = self.output.clone()
            self.done.record(stream)
        return output
