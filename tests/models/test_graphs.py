"""The bookkeeping of CUDA graphs, with graphs of operators on the CPU."""

import copy
import pickle
import warnings
from typing import NamedTuple

import pytest
import recorded_graphs
import torch

from pro2sam_fast.models.graphs import GraphCache


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    recorded_graphs.use(monkeypatch)


class Pair(NamedTuple):
    total: torch.Tensor
    scaled: torch.Tensor


WEIGHT = torch.tensor([2.0])
calls = []


def pair(x, y):
    calls.append(len(x))
    return Pair((x * y).sum(), x * WEIGHT)


def test_a_graph_from_the_second_call_on():
    calls.clear()
    cached = GraphCache(pair, most=2)
    found = []
    for size, value in ((2, 1), (2, 2), (3, 3), (3, 4), (4, 5), (4, 6), (2, 7), (3, 8), (2, 9)):
        x, y = torch.full((size,), float(value)), torch.arange(float(size))
        found.append((cached(x, y), x, y))
    # once as it is, then to warm up and to record; the third size always as it is
    assert calls == [2, 2, 2, 3, 3, 3, 4, 4]
    for result, x, y in found:  # earlier results too
        assert isinstance(result, Pair)
        assert torch.equal(result.total, (x * y).sum()) and torch.equal(result.scaled, 2 * x)
    first, second = cached._graphs.values()
    assert first.graph.pool() is second.graph.pool() and first.done is second.done and first.stream is second.stream
    assert first.graph.replays == 3 and second.graph.replays == 2


def test_arguments_and_results_are_the_callers():
    cached = GraphCache(lambda x: x)  # a result that is an argument
    x = torch.zeros(3)
    for value in range(4):
        x.fill_(value)
        result = cached(x)
    x.fill_(9)
    assert result.tolist() == [3, 3, 3]
    result.fill_(8)
    assert cached(x).tolist() == [9, 9, 9]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_under_any_mode(mode):
    cached = GraphCache(lambda x: x + WEIGHT)
    with mode():
        for value in range(3):
            assert cached(torch.full((2,), float(value))).tolist() == [value + 2] * 2
    with torch.no_grad():
        assert cached(torch.ones(2)).tolist() == [3, 3]
    assert len(cached._graphs) == 1


def test_strides_and_dtypes_have_graphs_of_their_own():
    cached = GraphCache(lambda x: x.flatten() * 1)
    x = torch.arange(6).view(2, 3)
    for given in (x, x.T.contiguous().T, x.float()) * 3:
        assert cached(given).tolist() == list(range(6))
    assert len(cached._graphs) == 3 and all(cached._graphs.values())


def test_one_by_one_after_a_warning():
    cached = GraphCache(lambda x: x * int(x.sum()) if len(x) == 2 else x + 1)
    x = torch.ones(2)
    assert cached(x).tolist() == [2, 2]
    with pytest.warns(RuntimeWarning, match=r"recorded \(RuntimeError: operation not permitted.*\); launches go one"):
        assert cached(x).tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert cached(x).tolist() == [2, 2] and cached(torch.zeros(3)).tolist() == [1, 1, 1]
    assert [graph is cached.function for graph in cached._graphs.values()] == [True, False]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cached: pickle.loads(pickle.dumps(cached))])
def test_copies_record_their_own(copied):
    cached = GraphCache(pair, most=3)
    for _ in range(3):
        cached(WEIGHT, WEIGHT)
    other = copied(cached)
    assert other.most == 3 and not other._graphs
    assert other(WEIGHT, WEIGHT) == cached(WEIGHT, WEIGHT)
