"""Photos spread over several devices: a process for each, whoever is free takes the next few, results in input order.

Processes instead of threads, because what Python does for a photo would otherwise be done for all devices in turn.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .errors import BackendError, ConfigError
from .pipelines.pro2sam import AUTO_BATCH, check_batch_size, resolve_device

__all__ = ["Build", "check_devices", "photos_at_a_time", "workers"]

_CHUNKS_A_WORKER = 2  # one at work and one to go on with
_SECONDS_TO_END = 5.0

# Called with a device: the function from a list of items to an iterator over one result for each, and facts about it.
Build = Callable[[str], tuple[Callable[[list], Iterable], Any]]


def check_devices(devices: str | Sequence[str | int]) -> list[str]:
    """ "0,1", "cuda:0,cuda:1", "cpu" or a list of such names -> names of devices that are there; a number is a GPU's.

    A name may stand twice: two processes share the device.
    Raises ConfigError for an unknown device and BackendError for one that isn't there.
    """
    if isinstance(devices, str):
        devices = devices.replace(" ", "").split(",")
    names = [f"cuda:{name}" if str(name).isdecimal() else str(name) for name in devices]
    if not names:
        raise ConfigError("devices must name at least one device, for instance '0,1'")
    return [str(resolve_device(name)) for name in names]


def photos_at_a_time(devices: Sequence[str], batch_size: int | str, count: int | None = None) -> int:
    """How many photos a process takes at a time: a pass, or less where there wouldn't be two for each process."""
    check_batch_size(batch_size)
    size = AUTO_BATCH.get(resolve_device(devices[0]).type, 1) if batch_size == "auto" else batch_size
    return size if count is None else max(1, min(size, -(-count // (_CHUNKS_A_WORKER * len(devices)))))


@contextlib.contextmanager
def workers(build: Build, devices: Sequence[str], size: int) -> Iterator[tuple[Callable[[Iterable], Iterator], Any]]:
    """The function from items to an iterator over their results, in order, and the facts that ``build`` gives.

    On one device the work is done here. On several, each gets a process that imports, builds and works by itself;
    ``build``, items and results must be picklable, and a script needs its ``if __name__ == "__main__":``. What a
    process raises is raised here, after the results before it; then, and when the block ends, all are stopped.

    Args:
        build: see `Build`.
        devices: from `check_devices`.
        size: items that a process gets at a time.

    Raises:
        What ``build`` raises, and BackendError if a process ends on its own.
    """
    if len(devices) == 1:
        work, facts = build(devices[0])
        yield lambda items: iter(work(items)), facts
        return
    crew: list[_Worker] = []
    with contextlib.ExitStack() as ending:
        for device in devices:
            crew.append(_Worker(build, device))
            ending.callback(crew[-1].stop)
        facts = [worker.ready() for worker in crew]
        yield lambda items: _in_order(crew, items, size), facts[0]
        for worker in crew:
            worker.dismiss()


def _in_order(crew: list[_Worker], items: Iterable, size: int) -> Iterator:
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def run(chunk: list) -> tuple[list, Exception | None]:
        worker = idle.get()
        try:
            return worker.work(chunk)
        finally:
            idle.put(worker)

    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, size)), [])
    # A thread for each process, which waits for its answers.
    threads = ThreadPoolExecutor(len(crew))
    try:
        pending = deque(threads.submit(run, c) for c in itertools.islice(chunks, _CHUNKS_A_WORKER * len(crew)))
        while pending:
            results, error = pending.popleft().result()
            pending.extend(threads.submit(run, chunk) for chunk in itertools.islice(chunks, 1))
            yield from results
            if error is not None:
                raise error
    except BaseException:
        for worker in crew:
            worker.stop()
        raise
    finally:
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that answers (results, what it raised) to every list of items."""

    def __init__(self, build: Build, device: str):
        self.device = device
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, _pickled(build), device, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name=f"pro2sam-fast {device}")
        with _without_interrupts(), _patient_threads():
            self._process.start()
        theirs.close()

    def ready(self) -> Any:
        facts, error = self._answer()
        if error is not None:
            raise error
        return facts

    def work(self, items: list) -> tuple[list, Exception | None]:
        message = _pickled(items)
        try:
            self._connection.send_bytes(message)
        except OSError:
            raise self._ended() from None
        return self._answer()

    def dismiss(self) -> None:
        """Lets the process end by itself."""
        self._connection.close()
        self._process.join(_SECONDS_TO_END)

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(_SECONDS_TO_END)

    def _answer(self) -> tuple[Any, Exception | None]:
        try:
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> BackendError:
        self._process.join(_SECONDS_TO_END)
        status = self._process.exitcode
        how = f"was killed by signal {-status}" if status and status < 0 else f"ended with exit status {status}"
        return BackendError(f"the process on device '{self.device}' {how}; perhaps memory was short")


def _serve(connection, build: bytes, device: str, threads: int) -> None:
    """The process: builds, then answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        work, facts = pickle.loads(build)(device)
    except Exception as error:
        _send(connection, None, error)
        return
    if not _send(connection, facts, None):
        return
    with contextlib.suppress(EOFError, OSError):
        while True:
            items, results, failure = pickle.loads(connection.recv_bytes()), [], None
            try:
                for result in work(items):
                    results.append(result)
            except Exception as error:
                failure = error
            if not _send(connection, results, failure):
                return


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _send(connection, results: Any, error: Exception | None) -> bool:
    """False if the parent is gone. Plain pickles: torch's own would go through files in shared memory."""
    with contextlib.suppress(OSError):
        connection.send_bytes(pickle.dumps((results, error and _portable(error))))
        return True
    return False


def _portable(error: Exception) -> Exception:
    """The error itself if it can be sent, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ConfigError(f"on several devices, models and photos must be such as can be pickled: {error}") from error


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What starts inside the block ignores Ctrl-C from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _patient_threads() -> Iterator[None]:
    """OpenMP threads of what starts inside the block sleep while they wait.

    By default they spin, and where two processes share the cores, each then spins away the time the other needs.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]
