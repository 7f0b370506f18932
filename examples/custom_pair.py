"""Any coarse localizer with any SAM: here "what differs from the photo's border" picks the mask.

python examples/custom_pair.py examples/images/cat.jpg out

Published networks pair in the same way:

    pro2sam_fast.load(coarse="gtformer.pth", sam="vit_h", sam_checkpoint="sam_vit_h_4b8939.pth", sam_input=224)
"""

import sys

import numpy as np
import torch
from PIL import Image

import pro2sam_fast


class BorderContrast:
    """Coarse map: colour distance to the mean of the border, at 28 x 28, scaled to 0..1. It has no label."""

    def prepare(self, rgb):
        small = np.asarray(Image.fromarray(rgb).resize((28, 28), Image.Resampling.BOX), np.float32) / 255
        return torch.from_numpy(small).permute(2, 0, 1)

    def __call__(self, batch):
        border = torch.cat([batch[:, :, 0], batch[:, :, -1], batch[:, :, :, 0], batch[:, :, :, -1]], dim=2)
        distance = (batch - border.mean(dim=2)[:, :, None, None]).norm(dim=1)
        peak = distance.amax(dim=(1, 2), keepdim=True).clamp_min(1e-6)
        return {"map": distance / peak}


def main(path: str, output: str) -> None:
    localizer = pro2sam_fast.load(coarse=BorderContrast(), sam="lite", prompt_threshold=0.5)
    (photo,) = localizer(path)
    print(f"box {photo.box}, match {photo.score:.2f}, from {photo.source}; {len(photo.candidates)} candidates kept")
    photo.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
