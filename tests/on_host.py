"""The CUDA kernels compiled for the host, where a fibre plays each thread; see host/cuda_on_host.h."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WORD = 64
PART_ROWS = 128
PART_VALUES = 7


@functools.cache
def library():
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the kernels for the host")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'include'}"]
        subprocess.run([compiler, *flags, str(ROOT / "tests/host/kernels.cpp"), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def call(name, *arguments):
    """Tensors go as addresses, floats as float32, the rest as 64-bit integers."""
    converted = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            assert x.is_contiguous()
            converted.append(ctypes.c_void_p(x.data_ptr()))
        else:
            converted.append(x if isinstance(x, (ctypes.c_float, ctypes.c_double)) else ctypes.c_int64(x))
    assert getattr(library(), name)(*converted) == 0, f"{name}: a barrier that not every thread reaches"


def compact(keep):
    index, count = torch.empty(len(keep), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    call("compact", keep.contiguous(), index, count, len(keep))
    return index, count


def nms(boxes, order, threshold, taking_part=None, words_at_once=None):
    """`order` of the visit; see NmsScratch."""
    words = -(-len(boxes) // WORD)
    at_once = words_at_once or max(1, words)
    keep, kept = torch.empty(len(boxes), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    alive, overlaps = (torch.empty(n, dtype=torch.int64) for n in (words, at_once * words * WORD))
    part = 0 if taking_part is None else taking_part
    call(
        *("nms", boxes.contiguous(), order, part, keep, kept, alive, overlaps, len(boxes), at_once),
        ctypes.c_double(threshold),
    )
    return keep, kept


def _sizes(low_res, img_size, input_size, size):
    return torch.tensor([*low_res.shape[1:], img_size, *input_size, *size], dtype=torch.int64)


def mask_measure(low_res, img_size, input_size, size, threshold, offset, fused):
    low_res, count = low_res.contiguous(), len(low_res)
    out = [torch.empty(shape, dtype=torch.int64) for shape in ((count,),) * 3 + ((count, 4),)]
    partial = torch.empty(count * -(-size[0] // PART_ROWS) * PART_VALUES, dtype=torch.int64)
    cuts = (ctypes.c_float(x) for x in (threshold + offset, threshold - offset, threshold))
    sizes = _sizes(low_res, img_size, input_size, size)
    call("mask_measure", low_res, *out, partial, count, sizes, *cuts, int(fused))
    return tuple(out)


def mask_pack(low_res, img_size, input_size, size, threshold, fused, canvas=None, origin=(0, 0)):
    low_res, (height, width) = low_res.contiguous(), canvas or size
    words = -(-width // WORD)
    masks = torch.empty((len(low_res), height, words), dtype=torch.int64)
    sizes, cut = _sizes(low_res, img_size, input_size, size), ctypes.c_float(threshold)
    call("mask_pack", low_res, masks, len(low_res), sizes, cut, height, words, origin[1], origin[0], int(fused))
    return masks


def mask_taps(n_in, n_out, fused):
    """int32 (n_out, 2) positions and float32 (n_out, 2) weights."""
    indices, weights = np.empty((n_out, 2), np.int32), np.empty((n_out, 2), np.float32)
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in (indices, weights))
    library().mask_taps(ctypes.c_int64(n_in), ctypes.c_int64(n_out), int(fused), *pointers)
    return indices, weights
