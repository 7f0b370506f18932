"""Labels of your own: a linear head on the bundled trunk, learned in seconds from a folder of photos for each class.

python examples/own_classes.py CLASSES examples/images out      # CLASSES/cat/1.jpg, CLASSES/cup/1.jpg, ...

Any network that gives logits plugs in the same way: `load(classifier=network, class_names=names)`. To learn where the
objects are from your labels too, see `pro2sam-fast train`.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import pro2sam_fast
from pro2sam_fast.io import iter_sources


class OwnClasses(nn.Module):
    """A linear layer on the trunk's pooled features (B, 1280) of photos (B, 3, 224, 224): logits (B, C)."""

    def __init__(self, label_head: nn.Module, classes: int):
        super().__init__()
        self.label_head = label_head
        self.linear = nn.Linear(1280, classes)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        trunk = self.label_head.trunk
        return trunk.head(trunk.features(self.label_head.renormalise(x))[-1]).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.pooled(x))


def main(classes: str, photos: str, output: str, device: str = "auto") -> None:
    folders = sorted(path for path in Path(classes).iterdir() if path.is_dir())
    stage = pro2sam_fast.load("lite", device="cpu").classifier  # a photo -> the network's input -> logits
    model = OwnClasses(stage.model, len(folders))
    features, labels = [], []
    with torch.no_grad():
        for label, folder in enumerate(folders):
            for source in iter_sources(folder):
                features.append(model.pooled(stage.prepare(source.read())[None]))
                labels.append(label)
    x, y = torch.cat(features), torch.tensor(labels)
    optimizer = torch.optim.LBFGS(model.linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model.linear(x), y) + 1e-3 * model.linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    names = [folder.name for folder in folders]
    print(f"{len(y)} photos of {len(names)} classes learned")
    localizer = pro2sam_fast.load("lite", classifier=model, class_names=names, device=device)
    for photo in localizer(photos, stream=True):
        print(f"{photo.path}: {photo.label_name} {photo.label_score:.0%}, box {photo.box}")
        photo.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
