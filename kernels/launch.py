"""Where kernels are launched."""

import contextlib

import torch


def on(tensor: torch.Tensor):
    """Makes the device of a CUDA tensor the current one; other tensors are the interpreter's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
