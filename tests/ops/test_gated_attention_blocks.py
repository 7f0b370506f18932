"""The CUDA kernels' blocks on the host: their index maps, layouts and arithmetic at every tile edge, without a GPU."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pro2sam_fast.ops.gated_attention import _gated_attention, _gated_attention_backward
from pro2sam_fast.testing import assert_matches

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (32, 64)
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtype: Number
DTYPES, EITHER = (  # all, and one of each kind of product
    pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).partition(".")[2])
    for dtypes in (NUMBERS, (torch.float32, torch.bfloat16))
)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("blocks") / "blocks.so"
    includes = ["-I", ROOT / "csrc" / "include", "-I", ROOT / "csrc" / "cuda"]
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *includes]
    subprocess.run([*command, Path(__file__).with_name("gated_attention_blocks.cpp"), "-o", library], check=True)
    return ctypes.CDLL(str(library)).gated_attention_blocks


def call(blocks, tensors, strides, sizes, gate, backward):
    """tensors: q, k, v, out, maps, lse, mean_map, ... in the order of the library."""
    addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    numbers = [(ctypes.c_int64 * len(row))(*row) for row in (strides, sizes)]
    blocks(addresses, *numbers, int(gate), ctypes.c_int64(NUMBERS[tensors[0].dtype]), int(backward))


def check(blocks, batch, tokens, heads, width, queries, dtype=torch.bfloat16, gate=True, first_row=0, rows=None):
    rows, dim = tokens if rows is None else rows, heads * width
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    q, k, v = draw(batch, tokens, 3 * dim).to(dtype).chunk(3, -1)
    grad_out, grad_maps = draw(batch, rows, dim).to(dtype), draw(batch, queries, tokens)
    out, maps, lse = torch.empty_like(grad_out), torch.empty_like(grad_maps), torch.empty(batch, heads, rows)
    mean_map, delta = torch.empty(batch, tokens), torch.empty_like(lse)
    grad_gate, grad_logits = torch.empty(batch, heads, tokens), torch.empty_like(grad_maps)
    grads = [torch.empty(batch, tokens, dim, dtype=dtype) for _ in range(3)]
    forward = (q, k, v, out, maps, lse, mean_map)
    strides = [stride for t in (q, k, v) for stride in t.stride()[:2]]
    sizes = [batch, tokens, dim, heads, queries, first_row, rows]
    call(blocks, forward, strides, sizes, gate, False)
    call(blocks, (*forward, grad_out, grad_maps, *grads, delta, grad_gate, grad_logits), strides, sizes, gate, True)

    wide = [t.double() for t in (q, k, v)]
    expected = _gated_attention(*wide, heads, queries, gate, first_row, rows)
    expected_grads = _gated_attention_backward(
        grad_out.double(), grad_maps.double(), *wide, *expected, heads, gate, first_row
    )
    actual = (out, maps, lse, *grads)
    assert_matches(tuple(t.double() for t in actual), (*expected, *expected_grads), tolerance(dtype))


def tolerance(dtype):
    return dtype if dtype == torch.float32 else f"{str(dtype).partition('.')[2]} products"


@DTYPES
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_parity(blocks, width, gate, dtype):
    check(blocks, 2, 201, 3, width, 4, dtype, gate)


@EITHER
@pytest.mark.parametrize("tokens", [*range(1, 4), 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 198, 257])
def test_every_tile_edge(blocks, tokens, dtype):
    check(blocks, 1, tokens, 2, 32, min(tokens, 4), dtype)


@EITHER
@pytest.mark.parametrize("queries", [1, 7, 8, 9, 17, 40])
def test_any_number_of_queries(blocks, queries, dtype):
    check(blocks, 2, 40, 2, 32, queries, dtype)


@EITHER
def test_no_queries(blocks, dtype):
    check(blocks, 2, 37, 2, 64, 0, dtype, gate=False)


@EITHER
@pytest.mark.parametrize(("first_row", "rows"), [(1, 50), (3, 52), (45, 10), (50, 5), (7, 1), (20, 0)])
def test_some_rows(blocks, first_row, rows, dtype):
    check(blocks, 2, 55, 3, 32, 4, dtype, first_row=first_row, rows=rows)


@EITHER
def test_large_logits(blocks, dtype):
    q = 40 * torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, maps, lse, mean_map = torch.empty_like(q), torch.empty(1, 4, 40), torch.empty(1, 2, 40), torch.empty(1, 40)
    call(blocks, (q, q, q, out, maps, lse, mean_map), [40 * 64, 64] * 3, [1, 40, 64, 2, 4, 0, 40], True, False)
    expected = _gated_attention(*[q.double()] * 3, 2, 4, True, 0, 40)
    assert_matches((out.double(), maps.double()), expected[:2], "bfloat16 products")
    assert math.isclose(lse.max(), expected[2].max(), rel_tol=1e-5)
