"""Every CUDA kernel compiles for every target without a GPU, without warnings, and none spills registers."""

import ahead_of_time
import pytest
from ahead_of_time import CUDA_FILES, compile_cuda, cuda_kernels, cuda_targets

if ahead_of_time.nvcc() is None:
    pytest.skip("nvcc isn't here", allow_module_level=True)


@pytest.mark.parametrize("file", CUDA_FILES, ids=lambda file: file.stem)
def test_compiles_without_warnings_or_spills(file, tmp_path):
    found, warnings = compile_cuda(file, tmp_path)
    assert not warnings
    assert {kernel.target for kernel in found} == {f"sm_{arch}" for arch in cuda_targets()}
    assert {kernel.kernel.partition("<")[0] for kernel in found} <= cuda_kernels()
    for kernel in found:
        assert 0 < kernel.registers <= 255 and kernel.spills == 0, kernel
