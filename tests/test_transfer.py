"""Copies between host and device: several tensors in one, and in step with the work of the device."""

import contextlib
import types

import numpy as np
import pytest
import torch

from pro2sam_fast import transfer
from pro2sam_fast.gallery import MaskGallery, galleries_to_host
from pro2sam_fast.transfer import Reading, Upload, in_step, packed, to_device, to_host, unpacked

TENSORS = (
    torch.arange(7, dtype=torch.int64)[::2],
    torch.tensor([True, False, True]),
    torch.zeros(0, 4, dtype=torch.int64),
    torch.tensor(2.5),
    torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).T,
    torch.arange(5, dtype=torch.uint8),
    torch.tensor([[1.5, -0.0]], dtype=torch.float64).expand(3, 2),
    torch.tensor([1.25, float("nan")], dtype=torch.float16),
)


def test_tensors_of_any_kind_come_back_as_they_were():
    buffer = packed(TENSORS)
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1 and len(buffer) % 8 == 0
    back = unpacked(Reading(buffer).result(), TENSORS)
    buffer.zero_()  # what comes back is in memory of its own
    for x, y in zip(back, TENSORS, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    assert unpacked(packed([torch.tensor(1)]), [torch.tensor(2)])[0].item() == 1


def test_nothing_is_copied_on_the_cpu():
    assert all(x is y for x, y in zip(to_host(TENSORS), TENSORS, strict=True)) and to_host([]) == []
    assert all(x is to_device(x, torch.device("cpu")) is Upload(x, torch.device("cpu")).result() for x in TENSORS)
    gallery = MaskGallery.from_dense(torch.rand(3, 5, 70) > 0.5)
    (same,) = galleries_to_host([gallery])
    assert all(x is y for x, y in zip(same.tensors(), gallery.tensors(), strict=True))


def test_generators_in_step_share_their_copies(monkeypatch):
    copies = []
    monkeypatch.setattr(transfer, "to_host", lambda tensors: copies.append(len(tensors)) or [x + 1 for x in tensors])

    def task(start, steps):
        total = start
        for step in range(steps):
            (*_, total) = yield [torch.zeros(2)] * step + [total]
        return total

    results = in_step(task(torch.tensor(10 * n), n) for n in (2, 0, 3, 1))
    assert [int(x) for x in results] == [22, 0, 33, 11] and copies == [3, 4, 3, 0]
    with pytest.raises(KeyError):
        in_step([task(torch.tensor(1), 2), failing()])


def failing():
    yield [torch.zeros(1)]
    raise KeyError


def test_an_upload_is_in_step_with_both_streams(monkeypatch):
    """Stand-ins for the streams: copied and marked on one, waited for and held by the other."""
    done = []

    def event():
        return types.SimpleNamespace(record=lambda: done.append("record"))

    there = types.SimpleNamespace(device="there", record_stream=lambda stream: done.append(("held by", stream)))
    current = types.SimpleNamespace(wait_event=lambda event: done.append("wait"))

    @contextlib.contextmanager
    def using(chosen):
        done.append(f"enter {chosen}")
        yield
        done.append("leave")

    monkeypatch.setattr(transfer, "_copies", lambda device: "copies")
    monkeypatch.setattr(transfer, "to_device", lambda tensor, device: done.append("copy") or there)
    monkeypatch.setattr(torch.cuda, "device", using)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    upload = Upload(torch.zeros(3), torch.device("cuda", 0))
    assert done == ["enter cuda:0", "enter copies", "copy", "record", "leave", "leave"]
    assert upload.result() is there and done[6:] == ["wait", ("held by", current)]


def test_uploads_share_no_stream_with_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: ("pool of priority", priority))
    assert transfer._copies.__wrapped__(torch.device("cuda", 0)) != torch.cuda.Stream()


@pytest.mark.cuda
def test_one_copy_from_a_gpu():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    there = [x.to(device) for x in TENSORS]
    back = to_host([*there, TENSORS[0]])
    assert back[-1] is TENSORS[0] and not any(x.is_cuda or x.is_pinned() for x in back)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(back, TENSORS, strict=False))
    gallery = MaskGallery.from_dense(torch.rand(9, 50, 70) > 0.5)
    moved = [MaskGallery(gallery.size, *(x.to(device) for x in gallery.tensors())) for _ in range(2)]
    assert all(torch.equal(x.masks, gallery.masks) for x in galleries_to_host(moved))


@pytest.mark.cuda
def test_uploads_and_readings_in_step_with_a_busy_gpu():
    """A wrong order shows as wrong numbers: memory of uploads and of pinned buffers is used again and again."""
    device = torch.device("cuda", 0)
    busy = torch.rand(2048, 2048, device=device)
    readings = []
    for i in range(50):
        upload = Upload(torch.full((1 << 20,), i, dtype=torch.int32), device)
        busy = torch.nn.functional.normalize(busy @ busy)
        readings.append(Reading(upload.result() + 1))
        del upload
    for i, reading in enumerate(readings):
        np.testing.assert_array_equal(reading.result().numpy(), i + 1)


@pytest.mark.cuda
def test_no_graphs_stream_is_that_of_uploads():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    copies = transfer._copies(device)
    assert all(torch.cuda.Stream(device).cuda_stream != copies.cuda_stream for _ in range(100))


@pytest.mark.cuda
def test_a_reading_waits_for_nothing_later():
    x = torch.arange(4, device="cuda")
    reading = Reading(x)
    torch.cuda._sleep(1 << 31)
    after = torch.cuda.Event()
    after.record()
    assert reading.result().tolist() == [0, 1, 2, 3] and not after.query()
    torch.cuda.synchronize()
