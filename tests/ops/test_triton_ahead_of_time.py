"""Every Triton kernel compiles to machine code without a GPU, and none spills registers."""

import pytest

triton = pytest.importorskip("triton", reason="triton isn't installed here")
pytest.importorskip("pro2sam_fast.kernels", reason="the Triton kernels install with `pip install .`")

from ahead_of_time import SHARED_LIMIT, compile_triton, triton_entries, triton_launched  # noqa: E402

from pro2sam_fast.ops._backends import interpreting  # noqa: E402

if interpreting():
    pytest.skip("the interpreter replaces the compiler (TRITON_INTERPRET=1)", allow_module_level=True)

CASES = [
    (entry, capability, aligned)
    for entry in triton_entries()
    for capability in entry.capabilities
    for aligned in entry.aligned
]
IDS = [f"{entry.name}-{sm}-{'aligned' if aligned else 'any'}" for entry, sm, aligned in CASES]


def test_every_kernel_is_listed():
    launched = triton_launched()
    assert launched and launched == {entry.name for entry, *_ in CASES}


@pytest.mark.parametrize(("entry", "capability", "aligned"), CASES, ids=IDS)
def test_compiles_without_spills(entry, capability, aligned, tmp_path, record_property):
    found = compile_triton(entry, capability, aligned, tmp_path)
    record_property("resources", str(found))
    print(found)
    assert 0 < found.registers <= 255
    assert found.spills == 0
    assert found.tensor_cores or not entry.multiplies_halves
    # A launch that isn't for sm_90 alone must fit every GPU.
    assert found.dynamic_shared <= SHARED_LIMIT[min(entry.capabilities)]
