"""Compiling the GPU kernels without a GPU, and reading what they need from what the compilers say.

Triton kernels are the entries of `AHEAD_OF_TIME` in the modules of `kernels`: (kernel, argument types, compile-time
constants) and, where a launch asks for more than Triton's defaults, a dict of compile options (`num_warps`,
`num_stages`, ...) whose key `capabilities`, default (80, 90), says which GPUs get that launch, and `aligned`, default
(False, True), whether tensors that 16 divides do. A type that ends in `:16`, as `i32:16`, is of an integer that 16
divides where pointers are aligned. CUDA kernels are the `__global__` functions of `csrc/cuda`, compiled for the targets
of CMakeLists.txt.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CUDA_FILES", "Resources", "TritonEntry", "compile_cuda", "compile_triton", "cuda_kernels", "cuda_targets", "nvcc",
    "triton_entries", "triton_launched",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
CUDA_FILES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CAPABILITIES = (80, 90)
# Every GPU from sm_80 on has 99 KiB of shared memory a block, sm_90 227 KiB.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10}
NVCC_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "-Xcompiler=-fvisibility=hidden", "-Xptxas=-v")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target.

    Attributes:
        kernel: name, with the template arguments of a CUDA kernel.
        types: of the arguments, and the compile-time constants.
        target: sm_80, ...
        registers: a thread.
        spills: bytes of stack and local memory a thread, where spilled registers go.
        static_shared: bytes a block.
        dynamic_shared: bytes a block; None if the launcher says so at run time.
        tensor_cores: "wgmma", "mma" or "": the matrix instructions in the PTX.
    """

    kernel: str
    types: str
    target: str
    registers: int
    spills: int
    static_shared: int
    dynamic_shared: int | None
    tensor_cores: str


@dataclass(frozen=True)
class TritonEntry:
    """One line of an `AHEAD_OF_TIME` list."""

    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]
    capabilities: tuple[int, ...]
    aligned: tuple[bool, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def multiplies_halves(self) -> bool:
        """Matrix products of 16-bit numbers, which tensor cores must do."""
        multiplies = re.search(r"\btl\.dot\(|\b(?:product|multiply)\(", inspect.getsource(self.kernel.fn))
        return bool(multiplies and {"*bf16", "*fp16"} & set(self.types.values()))

    def describe(self) -> str:
        """Distinct types of the pointers, the constants and the options, for instance `i64, fp32; BLOCK=64`."""
        pointers = dict.fromkeys(type_[1:] for type_ in self.types.values() if type_.startswith("*"))
        settings = {**self.constants, **self.options}
        return "; ".join((", ".join(pointers), ", ".join(f"{name}={value}" for name, value in settings.items())))


def _modules() -> list:
    kernels = importlib.import_module("pro2sam_fast.kernels")
    return [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]


def triton_entries() -> list[TritonEntry]:
    """Every entry of every module."""
    found = []
    for module in _modules():
        for kernel, types, constants, *more in getattr(module, "AHEAD_OF_TIME", ()):
            options = dict(more[0]) if more else {}
            capabilities = tuple(options.pop("capabilities", CAPABILITIES))
            aligned = tuple(options.pop("aligned", (False, True)))
            found.append(TritonEntry(kernel, types, constants, options, capabilities, aligned))
    return found


def triton_launched() -> set[str]:
    """Names of the kernels that the modules define."""
    import triton

    return {
        name
        for module in _modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


def compile_triton(entry: TritonEntry, capability: int, aligned: bool, folder: Path) -> Resources:
    """Compiles for sm_<capability>; `aligned` as for pointers and strides that 16 divides, what torch mostly gives.

    folder: gets the compiler's cache and the machine code; empty, or an old result would be taken for a new one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(entry.kernel.arg_names)}
    multiples = [(position[name],) for name, type_ in entry.types.items() if aligned and re.match(r"\*|.*:16$", type_)]
    types = {name: type_.partition(":")[0] for name, type_ in entry.types.items()}
    source = ASTSource(
        entry.kernel,
        {**types, **dict.fromkeys(entry.constants, "constexpr")},
        constexprs={(position[name],): value for name, value in entry.constants.items()},
        attrs={argument: [["tt.divisibility", 16]] for argument in multiples},
    )
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "cache")
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=entry.options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    return Resources(
        *(entry.name, entry.describe(), f"sm_{capability}", usage["REG"], usage["STACK"] + usage["LOCAL"]),
        *(usage["SHARED"], compiled.metadata.shared, _tensor_cores(ptx)),
    )


def nvcc() -> str | None:
    """The compiler that CMakeLists.txt would take, or None."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_targets() -> list[str]:
    """The architectures of CMakeLists.txt: 80, 86, ..., 90a, ..."""
    (listed,) = re.findall(r"^foreach\(arch ([\d a]+)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    return listed.split()


def cuda_kernels() -> set[str]:
    """Names of the `__global__` functions in `csrc/cuda`, without template arguments."""
    sources = [path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h", ".inl")]
    words = r"(?:void|static|inline|__\w+__(?:\s*\((?:[^()]|\([^()]*\))*\))?)\s+"
    pattern = rf"__global__\s+(?:{words})*(\w+)\s*\("
    return {name for path in sources for name in re.findall(pattern, path.read_text())}


def compile_cuda(file: Path, folder: Path) -> tuple[list[Resources], list[str]]:
    """Compiles one `.cu` for every target: what its kernels take, and the compilers' warnings.

    folder: gets the intermediate files; empty.
    Raises RuntimeError with the compiler's message if it doesn't compile.
    """
    codes = [option for arch in cuda_targets() for option in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    command = [nvcc(), *NVCC_FLAGS, "--threads=0", "-I", ROOT / "csrc" / "include", *codes]
    command += ["--keep", "--keep-dir", folder, "-c", file, "-o", folder / "kernels.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{file.name} doesn't compile:\n{text}")
    warnings = [line for line in text.splitlines() if re.search(r"warning|performance loss", line, re.IGNORECASE)]
    ptx = {arch: _entries((folder / f"{file.stem}.compute_{arch}.ptx").read_text()) for arch in cuda_targets()}
    return [_cuda_resources(*found, ptx[found[1]]) for found in _ptxas(text)], warnings


def _ptxas(text: str):
    """(mangled name, architecture, what ptxas says of it) of every entry function."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", text)
    return zip(parts[1::3], parts[2::3], parts[3::3])


def _cuda_resources(mangled: str, architecture: str, said: str, ptx: dict[str, str]) -> Resources:
    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    name, types = _demangled(mangled)
    body = ptx[mangled]
    return Resources(
        *(name, types, f"sm_{architecture}", number(r"Used (\d+) registers")),
        number(r"(\d+) bytes stack frame") + number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        *(number(r"(\d+) bytes smem"), None if _takes_dynamic(body, ptx) else 0, _tensor_cores(body)),
    )


def _demangled(mangled: str) -> tuple[str, str]:
    """Name with template arguments, and types of the arguments, without namespaces and without the enclosing file's."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)", "").removeprefix("void ")
    text = re.sub(r"_GLOBAL__N__\w+", "", text)
    text = re.sub(r"\w*::", "", re.sub(r"\((?:bool|int|unsigned int|long)\)(?=[\w-])", "", text))
    depth = 0
    for at, letter in enumerate(text):  # the first bracket outside template arguments begins the parameters
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return text[:at], text[at + 1 :].removesuffix(")")
    raise ValueError(f"no function: {text}")


def _entries(ptx: str) -> dict[str, str]:
    """Mangled name -> its PTX, with what stands before all entries under ""."""
    parts = re.split(r"\.entry (\w+)", ptx)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def _takes_dynamic(body: str, ptx: dict[str, str]) -> bool:
    names = re.findall(r"\.extern \.shared [^;]*?(\w+)\[\]", ptx[""])
    return any(re.search(rf"\b{name}\b", body) for name in names)


def _tensor_cores(ptx: str) -> str:
    return next((kind for kind in ("wgmma", "mma") if re.search(rf"\b{kind}\.\w", ptx)), "")
