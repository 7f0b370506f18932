"""Work for the processes of test_sharding.py, which import it by name."""

from __future__ import annotations

import os
import signal
import time

import torch

from pro2sam_fast.errors import ImageReadError


class Odd(Exception):
    """Can't be sent: its constructor takes something else than its message."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def square(items):
    """Squares of the items; words are special."""
    for item in items:
        if item == "die":
            os._exit(3)
        if item == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "odd":
            raise Odd("not", "portable")
        if item == "bad":
            raise ImageReadError("no photo", "a.png")
        if item == "hang":
            time.sleep(600)
        if item == "who":
            yield os.getpid(), torch.get_num_threads()
        else:
            time.sleep(0.02 * (item % 3))
            yield item * item


def build(device, error=None):
    if error is not None:
        raise error
    return square, f"facts of {device}"
