"""Builds the native modules with CMake; the metadata is in pyproject.toml. Imports no torch and looks for no GPU.

PRO2SAM_CUDA=auto (default) builds `_cuda` when nvcc is found, `on` insists, `off` leaves it out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CleanBuild(build):
    """A file that was deleted since the last build in this folder doesn't reach the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake run builds every extension; `_cuda` is optional because PRO2SAM_CUDA may leave it out."""

    def build_extensions(self):
        import pybind11

        cuda = os.environ.get("PRO2SAM_CUDA", "auto").lower()
        if cuda not in ("on", "off", "auto"):
            raise SystemExit(f"PRO2SAM_CUDA must be on, off or auto, not {cuda!r}")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("cmake isn't on PATH; install it or build with pip's build isolation")
        targets = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        stale = [*targets, *(ROOT / "pro2sam_fast" / path.name for path in targets if self.editable_mode)]
        for path in stale:
            path.unlink(missing_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "--fresh",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={targets[0].parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPRO2SAM_CUDA={cuda}",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


setup(
    packages=[*find_packages(include=["pro2sam_fast", "pro2sam_fast.*"]), "pro2sam_fast.kernels"],
    package_dir={"pro2sam_fast.kernels": "kernels"},
    ext_modules=[Extension("pro2sam_fast._cpu", []), Extension("pro2sam_fast._cuda", [], optional=True)],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
