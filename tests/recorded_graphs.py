"""CUDA graphs on the CPU: operators that run during a capture are noted, a replay runs them again on the same tensors.
As on a GPU nothing may wait in a capture, and a replay leaves only the results of its own graph as they should be."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pro2sam_fast.models import graphs

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _storages(tree):
    return {x.untyped_storage().data_ptr() for x in _tensors(tree) if x.layout == torch.strided}


class _Notes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = _storages((args, kwargs))
        own = [x.untyped_storage().data_ptr() not in given for x in _tensors(out)]
        self.calls.append((func, args, kwargs, _tensors(out), own))
        return out


class FakeGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.memory = [self]

    def pool(self):
        return self.memory

    def replay(self):
        for graph in self.memory:  # whose intermediate results may lie in the same place
            for *_, outputs, own in graph.notes.calls:
                for x in (x for x, is_own in zip(outputs, own, strict=True) if is_own and x.numel()):
                    x.fill_(1 if x.dtype == torch.bool else 77)
        for func, args, kwargs, outputs, own in self.notes.calls:
            for x, new, is_own in zip(outputs, _tensors(func(*args, **kwargs)), own, strict=True):
                if is_own:
                    x.copy_(new)
        self.replays = getattr(self, "replays", 0) + 1


@contextlib.contextmanager
def _capture(graph, pool, stream, capture_error_mode):
    graph.notes = _Notes()
    if pool is not None:
        graph.memory = pool
        pool.append(graph)
    with graph.notes:
        yield


class _Stream:
    def wait_stream(self, other):
        pass

    wait_event = record = wait_stream


def use(monkeypatch):
    """Makes CPU tensors recordable for a test."""
    monkeypatch.setattr(graphs, "_recordable", lambda x: True)
    fakes = {"CUDAGraph": FakeGraph, "graph": _capture, "Stream": _Stream, "Event": _Stream, "current_stream": _Stream}
    for name in ("stream", "device"):
        fakes[name] = lambda of: contextlib.nullcontext()
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
