"""A training run so small that it ends in seconds; its own module, so that other processes can import it."""

import numpy as np
import torch
from PIL import Image

from pro2sam_fast.data.localization import ImageFolder
from pro2sam_fast.models.gtformer import GTFormer
from pro2sam_fast.train.gtformer import TrainConfig, train_gtformer


def write_photos(root, classes=2, each=5):
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
            pixels[10:30, 10:30] = (255 * c, 40, 255 - 255 * c)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")


def model(seed=0, **options):
    torch.manual_seed(seed)
    return GTFormer(num_classes=2, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, **options)


def config(**options):
    return TrainConfig(**{"epochs": 3, "batch_size": 4, "lr": 1e-3, "save_every": 1, **options})


def train(photos, run, ema=0.9, **options):
    torch.set_num_threads(1)
    return train_gtformer(model(), ImageFolder(photos), run, config(ema=ema, **options))


def hungry(net, limit, backward=False):
    """Memory runs out with more photos than the limit."""
    seen = []

    def check(count):
        if count > limit:
            raise torch.OutOfMemoryError("out of memory")

    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])) if backward else check(len(inputs[0])))
    if backward:
        net.head.weight.register_hook(lambda _: check(seen[-1]))
    return net


def rank_main(rank, folder, photos, fails=None):
    """One of two ranks; they start with different weights, and the first one's count. Memory may run out on the
    second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    options = config(epochs=1, batch_size=4, area_sync=True, auto_batch=fails is not None)
    net = model(seed=rank, drop_path=0.0)
    if fails is not None and rank == 1:
        hungry(net, 1, backward=fails == "backward")
    train_gtformer(net, ImageFolder(photos), folder / "ranks", options)
    torch.distributed.destroy_process_group()
