"""Chunks that halve where memory ends."""

import pytest
import torch

from pro2sam_fast.errors import ImageReadError
from pro2sam_fast.memory import in_chunks, is_out_of_memory, items_per_chunk, joined, results_or_reasons


@pytest.mark.parametrize("most", [1, 2, 5, 100])
@pytest.mark.parametrize("count, size", [(0, 4), (1, 1), (13, 4), (13, 64)])
def test_every_item_once_and_in_order(count, size, most):
    def call(start, stop):
        if stop - start > most:
            raise MemoryError
        return list(range(start, stop))

    parts = in_chunks(call, count, size)
    assert [i for part in parts for i in part] == list(range(count))
    assert all(0 < len(part) <= size for part in parts)


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("shapes"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    def call(start, stop):
        raise error

    with pytest.raises(type(error)):
        in_chunks(call, 8, 8)


def upper(photos):
    if sum(map(len, photos)) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if "?" in photos:
        raise ImageReadError("unreadable")
    return [photo.upper() for photo in photos]


def test_what_fails_alone_has_a_reason():
    sizes, short = [], "the photo doesn't fit the memory"
    assert results_or_reasons(upper, [], True) == []
    found = results_or_reasons(upper, ["a", "b", "?", "long", "c"], strict=False, short=sizes.append)
    assert found == ["A", "B", "unreadable", short, "C"] and sizes == [2, 1, 1, 1]
    assert results_or_reasons(upper, ["a", "b", "c", "d"], strict=True) == ["A", "B", "C", "D"]


@pytest.mark.parametrize("photos, halves", [(["a", "?"], True), (["long"], True), (["abc", "d"], False)])
def test_strict_is_what_it_was_where_halves_are_no_help(photos, halves):
    with pytest.raises((ImageReadError, torch.OutOfMemoryError)):
        results_or_reasons(upper, photos, True, halves)
    with pytest.raises(RuntimeError, match="no kernel"):
        results_or_reasons(lambda part: exec('raise RuntimeError("no kernel")'), photos, strict=False)


def test_kinds_of_errors():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("no kernel"))


def test_sizes_and_joins():
    assert items_per_chunk(0) >= items_per_chunk(1) >= items_per_chunk(1 << 20) >= items_per_chunk(1 << 40) == 1
    one = torch.ones(2, 3)
    assert joined([one]) is one and joined([one, one]).shape == (4, 3)
