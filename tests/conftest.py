"""GPU tests skip with a reason; ops see poisoned `torch.empty`, so that output nobody wrote can't pass."""

import pytest
import torch

import pro2sam_fast
from pro2sam_fast import backends

POISON = {torch.bool: True, torch.uint8: 0xA5, torch.int32: -0x5A5A5A5B, torch.int64: -0x5A5A5A5A5A5A5A5B}
# With --may-lack-libraries (a GPU box without a network), a file that imports one that isn't there skips.
MAY_LACK = ("PIL", "cv2", "hypothesis", "jsonargparse", "pycocotools", "safetensors", "scipy", "timm", "tqdm")


def pytest_addoption(parser):
    parser.addoption("--may-lack-libraries", action="store_true", help="skip files whose libraries aren't installed")
    parser.addoption("--kills", type=int, default=4, help="how often a training run is killed in its test")


def pytest_report_header():
    states = ", ".join(f"{name} {state.state}" for name, state in backends().items())
    return [f"pro2sam_fast: {pro2sam_fast.__file__}", f"back ends: {states}"]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    error = report.call.excinfo.value.__cause__ if report.call.excinfo else None
    if not collector.config.getoption("--may-lack-libraries"):
        return report
    if isinstance(error, ModuleNotFoundError) and error.name.partition(".")[0] in MAY_LACK:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {error}")
    return report


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    if "ops" not in request.path.parts:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
            return tensor
        return tensor.fill_(POISON.get(tensor.dtype, float("nan")))

    return poisoned
