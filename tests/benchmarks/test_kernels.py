"""benchmarks/KERNELS.md lists the kernels that there are; whether they compile and spill is tested in tests/ops."""

import pytest

TODAY = [("`a_kernel`", "i64; N=1", "sm_80", "32", "0", "64", "0", "mma")]


@pytest.fixture(scope="module")
def kernels(bench):
    return bench("kernels")


def test_the_page_lists_every_cuda_kernel(kernels):
    rows = kernels.listed(kernels.PAGE.read_text())["CUDA"]
    assert {row[0].strip("`").partition("<")[0] for row in rows} == kernels.ahead_of_time.cuda_kernels()
    targets = {f"sm_{arch}" for arch in kernels.ahead_of_time.cuda_targets()}
    for name in {row[0] for row in rows}:
        assert {row[2] for row in rows if row[0] == name} == targets, name


def test_the_page_lists_every_triton_kernel(kernels):
    pytest.importorskip("triton", reason="triton isn't installed here")
    pytest.importorskip("pro2sam_fast.kernels", reason="the Triton kernels install with `pip install .`")
    entries = kernels.ahead_of_time.triton_entries()
    today = {(f"`{e.name}`", e.describe(), f"sm_{capability}") for e in entries for capability in e.capabilities}
    assert {row[: kernels.KEY] for row in kernels.listed(kernels.PAGE.read_text())["Triton"]} == today


def test_nothing_on_the_page_spills(kernels):
    for rows in kernels.listed(kernels.PAGE.read_text()).values():
        assert all(row[kernels.SPILLS] == "0" for row in rows)


def test_differences(kernels):
    (row,) = TODAY
    spilled, slower = (*row[:4], "8", *row[5:]), (*row[:3], "40", *row[4:])
    assert kernels.differences(TODAY, TODAY, numbers=True) == []
    assert kernels.differences([], TODAY, numbers=False) == ["not on the page: `a_kernel` i64; N=1 sm_80"]
    assert kernels.differences(TODAY, [], numbers=False) == ["no such kernel any more: `a_kernel` i64; N=1 sm_80"]
    assert "spills" in kernels.differences([spilled], TODAY, numbers=False)[0]
    assert kernels.differences(TODAY, [slower], numbers=False) == []
    assert kernels.differences(TODAY, [slower], numbers=True)[0].startswith("changed")


def test_the_page_can_be_read_back(kernels):
    rows = {"Triton": TODAY, "CUDA": [("`f<1|2>`", "int*", "sm_90a", "8", "0", "0", "at launch", "wgmma")]}
    text = kernels.render(rows, {"Triton": "triton 1", "CUDA": "nvcc 2"})
    assert kernels.listed(text) == rows


PTXAS = """ptxas info    : Compiling entry function '_ZN1a8k_kernelILi4EEEvPKf' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem
"""
PTX = """.extern .shared .align 16 .b8 tiles[];
.visible .entry _ZN1a8k_kernelILi4EEEvPKf(){ mov.u64 %rd1, tiles; wgmma.mma_async.sync.aligned; mma.sync.aligned; }
"""


def test_what_the_compilers_say_is_understood(kernels):
    said = kernels.ahead_of_time
    (found,) = said._ptxas(PTXAS)
    kernel = said._cuda_resources(*found, said._entries(PTX))
    expected = ("k_kernel<4>", "float const*", "sm_90a", 40, 28, 64, None, "wgmma")
    assert kernel == said.Resources(*expected)
