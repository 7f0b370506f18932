"""Photos shared by several processes: the results of one, in the same order, whatever goes wrong."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from squares import build

import pro2sam_fast
from pro2sam_fast import cli, localize
from pro2sam_fast.errors import BackendError, ConfigError, ImageReadError
from pro2sam_fast.sharding import check_devices, photos_at_a_time, workers

TWO = ["cpu", "cpu"]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


def test_results_come_in_order_from_every_process():
    with workers(build, [*TWO, "cpu"], 2) as (run, facts):
        assert facts == "facts of cpu"
        assert list(run(iter(range(25)))) == [n * n for n in range(25)]
        assert list(run([])) == []
        found = set(run(["who"] * 40))
    assert len({pid for pid, _ in found}) == 3 and {threads for _, threads in found} == {torch.get_num_threads()}
    assert os.getpid() not in {pid for pid, _ in found} and not any(alive(pid) for pid, _ in found)


def test_one_device_needs_no_process():
    with workers(build, ["cpu"], 2) as (run, facts):
        assert list(run([1, 2, "who"])) == [1, 4, (os.getpid(), torch.get_num_threads())]
    assert facts == "facts of cpu"


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield n

    with workers(build, TWO, 1) as (run, _):
        results = run(items())
        assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
        assert len(taken) <= 5 + 5


def test_an_error_comes_after_the_results_before_it():
    seen = []
    with pytest.raises(ImageReadError, match="^no photo$") as found, workers(build, TWO, 3) as (run, _):
        for result in run([2, 1, 4, 3, "bad", 5, 6, 7, 8]):
            seen.append(result)
    assert seen == [4, 1, 16, 9] and found.value.path == "a.png"


def test_an_error_that_cannot_be_sent_says_the_same():
    with pytest.raises(RuntimeError, match="^Odd: not portable$"), workers(build, TWO, 1) as (run, _):
        list(run(["odd"]))


@pytest.mark.parametrize(("item", "how"), [("die", "ended with exit status 3"), ("kill", "was killed by signal 9")])
def test_a_process_that_ends_is_told(item, how):
    seen = []
    with pytest.raises(BackendError, match=f"the process on device 'cpu' {how}"), workers(build, TWO, 1) as (run, _):
        for result in run([2, 3, item, 4]):
            seen.append(result)
    assert seen == [4, 9]


def test_an_error_while_building():
    failing = functools.partial(build, error=ConfigError("unknown model 'lit'"))
    with pytest.raises(ConfigError, match="unknown model 'lit'"), workers(failing, TWO, 1):
        pass


def test_what_cannot_be_sent_is_said():
    with pytest.raises(ConfigError, match="must be such as can be pickled"), workers(lambda device: None, TWO, 1):
        pass
    with pytest.raises(ConfigError, match="must be such as can be pickled"), workers(build, TWO, 1) as (run, _):
        list(run([lambda: None]))


def test_leaving_early_stops_everything():
    with workers(build, TWO, 1) as (run, _):
        pids = {pid for pid, _ in run(["who"] * 20)}
        results = run([2, "hang", "hang", "hang"])
        assert next(results) == 4
        begun = time.monotonic()
        results.close()
    assert time.monotonic() - begun < 10 and not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("cpu", ["cpu"]), ("cpu, cpu", TWO), (["cpu"], ["cpu"]), (torch.device("cpu").type, ["cpu"])],
)
def test_names_of_devices(given, expected):
    assert check_devices(given) == expected


@pytest.mark.parametrize(
    ("given", "error"),
    [("", ConfigError), ([], ConfigError), ("cpu,tpu", ConfigError), ("cuda:99", BackendError), ("0,99", BackendError)],
)
def test_devices_that_are_not_there(given, error):
    with pytest.raises(error):
        check_devices(given)


def test_how_many_photos_a_process_takes():
    assert [photos_at_a_time(TWO, size) for size in ("auto", 1, 7)] == [4, 1, 7]
    assert [photos_at_a_time(TWO, 8, count) for count in (0, 1, 4, 9, 33)] == [1, 1, 1, 3, 8]
    with pytest.raises(ConfigError, match="batch_size"):
        photos_at_a_time(TWO, "many")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(7):
        small = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96 + 16 * index, 80), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"bad")
    return folder


OPTIONS = ["--points-per-side", "4", "--quiet"]


def outputs(folder):
    """Files and records, without times."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*.jpg")}
    for log in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        found[log.name] = [{**record, "speed": set(record["speed"] or ())} for record in records]
    return found


@pytest.mark.parametrize("command", ["localize", "masks"])
def test_commands_give_the_same_on_two_devices(command, photos, tmp_path):
    status = [
        cli.main([command, str(photos), *OPTIONS, "--output", str(tmp_path / name), *where])
        for name, where in (("one", ["--device", "cpu"]), ("two", ["--devices", "cpu,cpu"]))
    ]
    assert status == [1, 1]  # one photo is bad
    one, two = (outputs(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 7 and one == two
    # Both stop at the bad photo, with the three before it.
    again = [str(photos), *OPTIONS, "--on-error", "raise", "--devices", "cpu,cpu", "--output", str(tmp_path / "stop")]
    assert cli.main([command, *again]) == 1
    (log,) = (tmp_path / "stop").glob("*.jsonl")
    assert len(log.read_text().splitlines()) == 3


def test_a_device_or_several(photos, tmp_path, capsys):
    arguments = ["localize", str(photos), "--output", str(tmp_path), "--device", "cpu", "--devices", "cpu,cpu"]
    assert cli.main(arguments) == 2
    assert "give --device or --devices, not both" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not both"):
        localize(photos, device="cpu", devices="cpu,cpu")
    with pytest.raises(ConfigError, match="give devices to load"):
        localize(photos, object.__new__(pro2sam_fast.pipelines.pro2sam.Localizer), devices="cpu,cpu")


@pytest.mark.slow
def test_the_function_gives_the_same_on_two_devices(photos):
    images = [np.asarray(Image.open(photos / f"{index}.png")) for index in (0, 1, 2)]
    source = [*images, str(photos / "3.png"), str(photos / "4.png")]
    options = {"points_per_side": 4, "on_error": "skip"}
    one, two = (localize(source, **where, **options) for where in ({"device": "cpu"}, {"devices": TWO}))
    for a, b in zip(one, two, strict=True):
        assert (a.path, a.name, a.box, a.score, a.error) == (b.path, b.name, b.box, b.score, b.error)
        assert (a.image is None) == (b.image is None)
        np.testing.assert_array_equal(a.mask, b.mask)


@pytest.mark.skipif(not Path("/proc").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_program(sign, photos, tmp_path):
    command = [sys.executable, "-m", "pro2sam_fast.cli", "localize", *[str(photos / "0.png")] * 400, *OPTIONS]
    command += ["--devices", "cpu,cpu", "--no-overlay", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(pro2sam_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "localizations.jsonl"
    how = {"env": environment, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # a shell starts what runs in its background deaf to Ctrl-C, and children inherit that
    how["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **how) as program:
        while program.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.05)
        children = [int(pid) for pid in Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()]
        if sign == signal.SIGINT:
            os.killpg(program.pid, sign)  # as a terminal does
        else:
            program.send_signal(sign)
        status = program.wait(timeout=60)
        assert len(children) >= 2  # and what Python's multiprocessing starts along with them
        assert status == (130 if sign == signal.SIGINT else -sign)
        begun = time.monotonic()
        while any(map(alive, children)) and time.monotonic() - begun < 30:
            time.sleep(0.1)
        assert not any(map(alive, children))
        if sign == signal.SIGINT:
            said = program.stderr.read()
            assert "continue with --resume" in said and "Traceback" not in said


@pytest.mark.cuda
def test_two_processes_on_gpus(photos):
    """On the first two GPUs, or both on the only one."""
    devices = [f"cuda:{index % torch.cuda.device_count()}" for index in range(2)]
    options = {"points_per_side": 4, "on_error": "skip", "batch_size": 1}
    one, two = localize(photos, device=devices[0], **options), localize(photos, devices=devices, **options)
    assert [(a.path, a.box, a.score) for a in one] == [(b.path, b.box, b.score) for b in two]
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(one, two, strict=True))
