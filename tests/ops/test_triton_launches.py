"""Every op's launch goes through Triton's launcher up to the machine code, without a GPU.

The launcher makes constants of integers that are 1 and notes which numbers 16 divides, so the arguments of a call
decide what is compiled: here those of the self-checks, which a GPU back end must pass first, and those of the least
sizes.
"""

import contextlib

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton isn't installed here")
pytest.importorskip("pro2sam_fast.kernels", reason="the Triton kernels install with `pip install .`")

from ahead_of_time import SHARED_LIMIT  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from pro2sam_fast.ops._backends import REGISTRATIONS, interpreting, triton_kernels  # noqa: E402
from pro2sam_fast.ops.decode_example import Arguments  # noqa: E402

if interpreting():
    pytest.skip("the interpreter replaces the launcher (TRITON_INTERPRET=1)", allow_module_level=True)

OPS = [name for name, op in REGISTRATIONS.items() if "triton" in op.implementations]


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


class Driver:
    """Of an sm_90 that isn't there; its number is no real GPU's, so no other test gets what was compiled for it."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 90

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What is launched, compiled."""
    compiled = []

    def launch(kernel, grid):
        return lambda *args, **options: compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(triton.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton_kernels("relative_attention"), "_wgmma", lambda device: True)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        yield compiled
    assert compiled and all(0 <= kernel.metadata.shared <= SHARED_LIMIT[90] for kernel in compiled)


def launch(op: str, arguments: tuple) -> None:
    arguments = tuple(x.as_subclass(OnGpu) if isinstance(x, torch.Tensor) else x for x in arguments)
    if not REGISTRATIONS[op].limit("triton", arguments):
        REGISTRATIONS[op].implementations["triton"](*arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("launched")
def test_self_checks(op):
    for example in REGISTRATIONS[op].examples.values():
        launch(op, example(torch.device("cpu")))


def least() -> dict[str, list[tuple]]:
    """Calls of each op in which as many numbers as possible are 1."""
    one, words, half = torch.ones(1), torch.ones((1, 1), dtype=torch.int64), torch.float16
    token = torch.ones((1, 1, 1), dtype=half)
    row = torch.ones((1, 1, 1))
    cell, pad = torch.ones((1, 1, 1, 1, 1), dtype=half), torch.ones((1, 1), dtype=half)
    decoder = Arguments((1, 1, 7, (8, 16), (1, 1), (64, 32)), half)
    decoder.hyper, decoder.first = torch.ones((1, 32)), torch.tensor([0, 1])
    frame = (row, 1, (1, 1), (1, 1), 0.0)
    return {
        "mask_match": [(words, words[0])],
        "mask_iou": [(words, words)],
        "compact": [(one > 0,)],
        "nms": [(torch.ones((1, 4)), one, 0.5)],
        "mask_measure": [(*frame, 1.0)],
        "mask_pack": [(*frame, (1, 1), (0, 0)), (*frame, (2, 2), (1, 1))],
        "add_layer_norm": [(one, one, one, one, 1e-6)],
        "gated_attention": [(token, token, token, 1, 1, True, 0, 1), (token, token, token, 1, 0, False, 0, 1)],
        "gated_attention_backward": [(token, row, token, token, token, token, row, row, 1, True, 0)],
        "relative_attention": [(cell, cell, cell, pad, pad, pad, pad, window) for window in (0, 1)],
        **{f"decode_{name}": [getattr(decoder, name)()[1]] for name in ("sweep0", "sweep1", "sweep2", "upscale")},
    }


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("launched")
def test_least_sizes(op):
    for arguments in least()[op]:
        launch(op, arguments)
