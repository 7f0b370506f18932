"""Where kernels are launched."""

import contextlib

import torch

# Launch option: products and sums round one by one, as in the references, but for tl.fma.
UNFUSED = {"enable_fp_fusion": False}


def on(tensor: torch.Tensor):
    """Makes the device of a CUDA tensor the current one; other tensors are the interpreter's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
