"""What a build must hold, checked on the installed package and the sources beside the tests; needs no GPU."""

import ast
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pro2sam_fast
from pro2sam_fast import _native, backends
from pro2sam_fast.errors import BackendError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(pro2sam_fast.__file__).resolve().parent


@pytest.fixture(scope="module")
def distribution():
    try:
        found = importlib.metadata.distribution("pro2sam-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pro2sam-fast isn't installed here, only on PYTHONPATH")
    if any("editable" in str(file) for file in found.files or ()):
        pytest.skip("an editable install runs from the sources")
    return found


def imports(path):
    """Top-level names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_setup_is_small_and_knows_no_torch():
    setup = ROOT / "setup.py"
    assert len(setup.read_text().splitlines()) <= 80
    assert set(imports(setup)) == {"os", "pathlib", "pybind11", "setuptools", "shutil", "subprocess", "sys"}


def test_the_tests_import_the_installed_package(distribution):
    assert Path(distribution.locate_file("pro2sam_fast")).resolve() == PACKAGE
    assert not PACKAGE.is_relative_to(ROOT)


def test_the_wheel_holds_everything(distribution):
    files = {str(file) for file in distribution.files}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "pro2sam_fast").rglob("*.py")}
    sources |= {f"pro2sam_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "pro2sam_fast" / "weights").glob("*")}
    assert sources <= files
    assert any(name.startswith("pro2sam_fast/_cpu.") for name in files)
    assert not any(name.startswith(("tests/", "kernels/", "csrc/")) for name in files)
    commands = {entry.name: entry.value for entry in distribution.entry_points}
    assert commands == {"pro2sam-fast": "pro2sam_fast.cli:main"}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, without what was built in them."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no sources beside the tests")
    pytest.importorskip("setuptools", reason="setuptools isn't installed here")
    left_out = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist")
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=left_out)


def test_the_sdist_builds_and_tests_itself(checkout, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--format=tar", f"--dist-dir={tmp_path}"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    names = ("CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "setup.py")
    wanted = [checkout / name for name in names]
    for folder in ("csrc", "examples", "kernels", "pro2sam_fast", "tests"):
        wanted += [path for path in (checkout / folder).rglob("*") if path.is_file()]
    missing = {str(path.relative_to(checkout)) for path in wanted} - held
    assert not missing


def test_deleted_files_do_not_reach_the_next_wheel(checkout):
    stale = checkout / "build" / "lib" / "pro2sam_fast" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    code = "import setuptools; setuptools.Distribution.has_ext_modules = lambda _: False; import setup"
    command = [sys.executable, "-c", code, "-q", "build", "--build-lib=build/lib"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    assert (stale.parent / "kernels" / "mask_match.py").exists()
    assert not stale.exists()


def test_auto_goes_without_an_nvcc_that_does_not_compile(checkout, tmp_path):
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 isn't installed here, pip builds with its own")
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on PATH, pip builds with its own")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_80 && exit\nexit 1\n")
    nvcc.chmod(0o755)
    configure = [cmake, f"-S{checkout}", f"-B{tmp_path / 'out'}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    environment = {**os.environ, "CUDA_HOME": str(nvcc.parents[1])}
    done = subprocess.run(configure, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"_cuda left out ({nvcc} doesn't compile here)" in done.stdout
    done = subprocess.run([*configure, "-DPRO2SAM_CUDA=on"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0


def test_native_modules_load(distribution):
    states = backends()
    assert states["cpu"].available, states["cpu"].reason
    built = any(str(file).startswith("pro2sam_fast/_cuda.") for file in distribution.files)
    assert states["cuda"].loaded == built, states["cuda"].reason


def test_native_modules_link_no_torch(distribution):
    for module in (_native._cpu, _native._cuda):
        if isinstance(module, _native.MissingModule):
            continue
        image = Path(module.__file__).read_bytes()
        assert b"libtorch" not in image and b"libc10" not in image
        assert b"libcudart.so" not in image


def test_newer_instructions_stay_in_their_own_functions(distribution):
    objdump = shutil.which("objdump")
    if objdump is None or platform.machine() != "x86_64":
        pytest.skip("needs objdump and an x86-64 build")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", _native._cpu.__file__], capture_output=True, text=True, check=True
    ).stdout
    users = {"ymm": set(), "zmm": set(), "vpopcntq": set()}
    for function in re.split(r"^[0-9a-f]+ <", listing, flags=re.MULTILINE)[1:]:
        name = function.partition(">")[0]
        for word, functions in users.items():
            if word in function:
                functions.add(name)
    assert users["vpopcntq"] and users["ymm"]
    assert all("avx512" in name for name in users["zmm"] | users["vpopcntq"])
    assert all("avx2" in name or "avx512" in name for name in users["ymm"])


def test_cuda_without_a_gpu_says_so():
    from pro2sam_fast import _cuda

    if backends()["cuda"].available:
        pytest.skip("there is a GPU")
    if not backends()["cuda"].loaded:
        with pytest.raises(BackendError, match="isn't built here"):
            _cuda.mask_match(0, 0, 0, 0, 1, 1, 0, 0)
        return
    assert _cuda.device_info()["error"]
    with pytest.raises(RuntimeError, match=r"mask_match: .*(CUDA|device)"):
        _cuda.mask_match(0, 0, 0, 0, 1, 1, 0, 0)
    assert backends()["cuda"].reason


def test_cuda_architectures():
    if not backends()["cuda"].loaded:
        pytest.skip(backends()["cuda"].reason)
    built = _native._cuda.architectures.split()
    assert {"80-real", "86-real", "89-real", "90a-real"} <= set(built)
    assert built[-1].endswith("-virtual"), "PTX of the newest serves GPUs that come later"


def test_the_source_tree_imports_without_a_build(tmp_path):
    (tmp_path / "pro2sam_fast").symlink_to(ROOT / "pro2sam_fast")
    code = """
import warnings, torch, pro2sam_fast
warnings.simplefilter("ignore")
from pro2sam_fast import _cpu, _cuda
from pro2sam_fast.ops import mask_match
words = torch.tensor([[1, 3]])
print(pro2sam_fast.__file__, pro2sam_fast.backends()["triton"], mask_match(words, words[0])[0].tolist())
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path)) and done.stdout.rstrip().endswith("[1.0]")


def test_import_is_light():
    code = "import sys, pro2sam_fast; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=os.sep)
    assert done.stdout.strip() == "False", done.stderr


def test_at_most_four_environment_variables():
    sources = [ROOT / "setup.py"]
    for folder in ("pro2sam_fast", "kernels", "csrc"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".cu", ".h", ".inl")]
    used = {name for path in sources for name in re.findall(r"\bPRO2SAM_[A-Z_]+\b", path.read_text())}
    table = (ROOT / "CONTRIBUTING.md").read_text()
    documented = set(re.findall(r"^\| `(PRO2SAM_[A-Z_]+)`", table, flags=re.MULTILINE))
    assert used == documented and len(documented) <= 4


def test_the_version_is_written_once(distribution):
    assert distribution.version == pro2sam_fast.__version__
    if (ROOT / "pyproject.toml").exists():
        assert pro2sam_fast.__version__ not in (ROOT / "pyproject.toml").read_text()
