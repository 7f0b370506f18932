"""Every Triton kernel compiles to machine code without a GPU, and none spills registers."""

import importlib
import pkgutil
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="triton isn't installed here")
kernels = pytest.importorskip("pro2sam_fast.kernels", reason="the Triton kernels install with `pip install .`")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pro2sam_fast.ops._backends import interpreting  # noqa: E402

if interpreting():
    pytest.skip("the interpreter replaces the compiler (TRITON_INTERPRET=1)", allow_module_level=True)

MODULES = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
ENTRIES = [entry for module in MODULES for entry in getattr(module, "AHEAD_OF_TIME", ())]


def resources(cubin):
    """Registers a thread, static shared memory in bytes, and stack and local memory in bytes, where spills go."""
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {name: int(value) for name, value in usage.items()}


def test_every_kernel_is_listed():
    compiled = {kernel.fn.__qualname__ for kernel, _, _ in ENTRIES}
    launched = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert launched and launched == compiled


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("aligned", [False, True], ids=["any", "aligned"])
@pytest.mark.parametrize(
    ("kernel", "types", "constants"), ENTRIES, ids=[kernel.fn.__name__ for kernel, _, _ in ENTRIES]
)
def test_compiles_without_spills(kernel, types, constants, aligned, capability, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    # What a launch with 16-byte aligned tensors asks for.
    pointers = [(position[name],) for name, type_ in types.items() if aligned and type_.startswith("*")]
    source = ASTSource(
        kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={pointer: [["tt.divisibility", 16]] for pointer in pointers},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = resources(cubin)
    record_property("resources", {**usage, "dynamic_shared": compiled.metadata.shared})
    print(f"{kernel.fn.__name__} sm_{capability}: {usage}, dynamic shared {compiled.metadata.shared}")
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert 0 < usage["REG"] <= 255
    assert usage["STACK"] == usage["LOCAL"] == 0, "spills"
    assert compiled.metadata.shared <= 99 * 1024, "more shared memory than sm_86 and sm_89 have"
