"""Native calls leave the interpreter to other threads."""

import sys
import threading
import time

import pytest
import torch

from pro2sam_fast import _native
from pro2sam_fast.ops import gated_attention, mask_iou, mask_match, mask_measure, mask_pack, nms


def words(count):
    return torch.randint(-(1 << 62), 1 << 62, (count, 16384))


def logits():
    return torch.randn(32, 256, 256)


def boxes():
    corners = torch.rand(6000, 2) * 1000
    return torch.cat([corners, corners + 5], dim=1)


FRAME = (1024, (768, 1024), (1500, 2000))
CALLS = {
    "mask_match": lambda: mask_match(words(400), words(1)[0], backend="cpu"),
    "mask_iou": lambda: mask_iou(words(64), words(64), backend="cpu"),
    "mask_measure": lambda: mask_measure(logits(), *FRAME, 0.0, 1.0, backend="cpu"),
    "mask_pack": lambda: mask_pack(logits(), *FRAME, 0.0, backend="cpu"),
    "nms": lambda: nms(boxes(), torch.rand(6000), 0.9, backend="cpu"),
    "gated_attention": lambda: gated_attention(*torch.randn(3, 2, 785, 384), num_heads=6, num_queries=1, backend="cpu"),
}


class Watched:
    """The native module; notes which functions let another thread count while they ran."""

    def __init__(self, module, ticks):
        self.module, self.ticks, self.released = module, ticks, set()

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def call(*args):
            before = self.ticks[0]
            result = function(*args)
            if self.ticks[0] > before:
                self.released.add(name)
            return result

        return call


@pytest.mark.parametrize("name", CALLS)
def test_other_threads_go_on_during_a_call(name, monkeypatch):
    if isinstance(_native._cpu, _native.MissingModule):
        pytest.skip(_native._cpu.reason)
    ticks, done = [0], threading.Event()

    def count():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0)  # gives the interpreter back

    watched = Watched(_native._cpu, ticks)
    monkeypatch.setattr(_native, "_cpu", watched)
    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    counter.start()
    try:
        sys.setswitchinterval(1000)  # nobody is interrupted: others run only while a call has released the interpreter
        for _ in range(50):
            CALLS[name]()
            if name in watched.released:
                break
    finally:
        sys.setswitchinterval(interval)
        done.set()
        counter.join()
    assert name in watched.released
