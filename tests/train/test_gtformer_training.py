"""Training of GTFormer: kills, resumption, split batches, ranks, divergence."""

import csv
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_training import config, hungry, model, rank_main, train, write_photos

from pro2sam_fast.commands.train import _recipe, parser
from pro2sam_fast.data.localization import ImageFolder
from pro2sam_fast.errors import ConfigError
from pro2sam_fast.train.checkpoint import load_latest
from pro2sam_fast.train.gtformer import TrainingDivergedError, _Batches, _Trainer, train_gtformer
from pro2sam_fast.train.losses import LossConfig, localization_loss


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training"])
    return context


def same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_folder(photos, tmp_path):
    seen = []

    def evaluate(net):
        seen.append(net.training)
        return {"GT-known": [10.0, 30.0, 20.0][len(seen) - 1]}

    last = train_gtformer(model(), ImageFolder(photos), tmp_path / "run", config(), evaluate=evaluate)
    assert seen == [False] * 3
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert arguments["lr"] == 1e-3 and arguments["losses"]["area_target"] == 0.25 and arguments["photos"] == 10
    with (tmp_path / "run" / "summary.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [r["GT-known"] for r in rows] == ["10.0", "30.0", "20.0"]
    assert all(float(r["loss"]) > 0 and float(r["photos_per_s"]) > 0 for r in rows)
    net = model(seed=1)
    net.load_state_dict(load_file(last))
    assert not same(last, tmp_path / "run" / "best.safetensors")
    assert len(list((tmp_path / "run").glob("step_*.pt"))) == 2


def test_the_loss_falls(photos, tmp_path):
    train(photos, tmp_path / "run", epochs=12)
    with (tmp_path / "run" / "summary.csv").open() as f:
        losses = [float(r["ce"]) for r in csv.DictReader(f)]
    assert losses[-1] < 0.8 * losses[0]


def test_killed_runs_end_like_unbroken_ones(photos, tmp_path, processes, request):
    whole = train(photos, tmp_path / "whole", epochs=8)
    rng = np.random.default_rng(os.getpid())
    kills = 0
    while kills < request.config.getoption("--kills"):
        process = processes.Process(target=train, args=(photos, tmp_path / "broken"), kwargs={"epochs": 8})
        process.start()
        process.join(rng.uniform(0.05, 1.2))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        checkpoints = sorted((tmp_path / "broken").glob("step_*.pt"))
        if checkpoints:
            assert load_latest(tmp_path / "broken")["step"] == int(checkpoints[-1].stem[5:]), "the newest is readable"
        if process.exitcode == 0:
            break
    broken = train(photos, tmp_path / "broken", epochs=8)
    assert same(whole, broken)


def test_sigterm_saves_and_ends(photos, tmp_path, processes):
    process = processes.Process(
        target=train, args=(photos, tmp_path / "run"), kwargs={"epochs": 200, "save_every": 10**6}
    )
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "summary.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 1
    assert load_latest(tmp_path / "run")["step"] > 0


def test_a_run_keeps_its_configuration(photos, tmp_path):
    train(photos, tmp_path / "run", epochs=1)
    with pytest.raises(ConfigError, match="holds a run with lr=0.001, not 0.1"):
        train(photos, tmp_path / "run", epochs=1, lr=0.1)
    with pytest.raises(ConfigError, match="resume it or choose another folder"):
        train_gtformer(model(), ImageFolder(photos), tmp_path / "run", config(epochs=1, ema=0.9), resume=False)


def test_an_unreadable_checkpoint_is_passed_over(photos, tmp_path):
    whole = train(photos, tmp_path / "whole")
    train(photos, tmp_path / "run", epochs=3)
    newest = max((tmp_path / "run").glob("step_*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert same(whole, train(photos, tmp_path / "run", epochs=3))


@pytest.mark.parametrize("scheme", ["official", "sat", "mean_map_only"])
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_split_batches_give_the_gradient_of_the_whole(photos, scheme, micro_batch):
    # the area loss of a batch isn't the mean of its parts': an area between theirs tells
    losses = LossConfig(scheme=scheme, area_target=0.5)
    data = ImageFolder(photos)
    options = config(losses=losses, batch_size=7)
    images, labels, _ = _Batches(data, options, 0, 1)[0]
    whole, parts = model(drop_path=0.0).double(), model(drop_path=0.0).double()
    localization_loss(whole.train()(images.double()), labels, losses)["loss"].backward()
    trainer = _Trainer(parts, config(losses=losses, batch_size=7, micro_batch=micro_batch), torch.device("cpu"), 0, 1)
    terms = trainer._gradients(0, images.double(), labels, 7)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    wanted = localization_loss(whole(images.double()), labels, losses)
    assert terms["loss"] == pytest.approx(wanted["loss"].item(), rel=1e-9)


def test_out_of_memory(photos, tmp_path):
    with pytest.raises(ConfigError, match="use a micro_batch of 2, or auto_batch"):
        train_gtformer(hungry(model(), 2), ImageFolder(photos), tmp_path / "a", config(epochs=1))
    with pytest.raises(ConfigError, match="a single photo at a time"):
        train_gtformer(hungry(model(), 0), ImageFolder(photos), tmp_path / "c", config(epochs=1, auto_batch=True))
    train_gtformer(hungry(model(), 2), ImageFolder(photos), tmp_path / "b", config(epochs=1, auto_batch=True))
    assert load_latest(tmp_path / "b")["step"] == 3


def test_divergence_keeps_the_batch(photos, tmp_path):
    net = model()
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="diverged_0.pt"):
        train_gtformer(net, ImageFolder(photos), tmp_path / "run", config())
    saved = torch.load(tmp_path / "run" / "diverged_0.pt", weights_only=True)
    assert saved["images"].shape == (4, 3, 224, 224) and len(saved["indices"]) == 4


def test_a_gradient_that_is_not_finite_stops_too(photos, tmp_path):
    net = model()
    net.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingDivergedError, match="'gradient_norm': (inf|nan)"):
        train_gtformer(net, ImageFolder(photos), tmp_path / "run", config())
    assert all(p.isfinite().all() for p in net.parameters())


def test_epochs_are_kept_and_told(photos, tmp_path, capsys):
    options = config(epochs=2, keep_epochs=True)
    last = train_gtformer(model(), ImageFolder(photos), tmp_path / "run", options)
    assert not same(tmp_path / "run" / "epoch_1.safetensors", last)
    assert same(tmp_path / "run" / "epoch_2.safetensors", last)
    first, second = capsys.readouterr().err.strip().splitlines()[-2:]
    assert first.startswith("epoch 1 of 2: loss ") and "photos_per_s" in first and "about 0:00:" in second


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--data cub", {}),
        ("--data cub --preset paper", {"betas": (0.9, 0.99), "weight_decay": 5e-4, "batch_size": 128}),
        ("--data cub --lr 0.1 --no-decay-embeddings", {"lr": 0.1, "decay_embeddings": False}),
        ("--data ilsvrc --preset sat --epochs 2", {"epochs": 2, "batch_size": 512, "lr": 1.5e-5}),
        ("--data ilsvrc --preset sat", {"epochs": 1, "drop_last": True, "keep_epochs": True}),
    ],
)
def test_published_recipes(options, wanted):
    arguments = parser().parse_args(["gtformer", *options.split()])
    recipe = _recipe(arguments, arguments.preset or "default")
    assert wanted.items() <= recipe.items() and (wanted or recipe == {})


def test_every_photo_once_an_epoch(photos):
    data = ImageFolder(photos)
    whole = _Batches(data, config(batch_size=4), 0, 1)
    assert [len(whole.indices(i)) for i in range(6)] == [4, 4, 2, 4, 4, 2]
    for epoch in range(2):
        assert sorted(i for s in range(3) for i in whole.indices(3 * epoch + s)) == list(range(10))
    assert not np.array_equal(whole.indices(0), whole.indices(3))
    ranks = [_Batches(data, config(batch_size=4), rank, 2) for rank in range(2)]
    assert sorted([*ranks[0][1][2].tolist(), *ranks[1][1][2].tolist()]) == sorted(whole.indices(1))
    dropping = _Batches(data, config(batch_size=4, drop_last=True), 0, 1)
    assert dropping.steps_per_epoch == 2
    with pytest.raises(ConfigError, match="too small for 3 ranks"):
        _Batches(data, config(batch_size=4), 0, 3)


@pytest.mark.parametrize("fails", [None, "forward", "backward"])
def test_two_ranks_are_one(photos, tmp_path, processes, fails):
    # also where memory runs out on one of them, and both take smaller parts
    workers = [processes.Process(target=rank_main, args=(rank, tmp_path, photos, fails)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0, 0]
    torch.set_num_threads(1)
    options = config(epochs=1, batch_size=4, area_sync=True)
    one = train_gtformer(model(drop_path=0.0), ImageFolder(photos), tmp_path / "one", options)
    a, b = load_file(one), load_file(tmp_path / "ranks" / "last.safetensors")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"micro_batch": 0},
        {"lr_schedule": "step"},
        {"amp": "float16"},
        {"ema": 1.0},
        {"workers": -1},
        {"seed": -6},
        {"lr": -1e-4},
        {"weight_decay": float("nan")},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        config(**options)


def test_classes_share_the_label_of_a_photo(tmp_path):
    write_photos(tmp_path, classes=2, each=2)
    data = ImageFolder(tmp_path)
    data.photos[1] = replace(data.photos[1], labels=(1, 0))
    batches = _Batches(data, config(batch_size=4), 0, 1)
    _, labels, order = batches[0]
    wanted = {0: [1, 0], 1: [0.5, 0.5], 2: [0, 1], 3: [0, 1]}
    assert labels.tolist() == [wanted[i] for i in order.tolist()]
