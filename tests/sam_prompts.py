"""SAM decoders and prompts of every kind for them."""

import torch

SIDE = 128
POINTS_AND_BOXES = ("one point", "two points", "eight points", "as many points as fit", "box", "point and box")
KINDS = (*POINTS_AND_BOXES, "mask", "point and mask", "everything")


def randomised(sam):
    """Parameters that start at zero or one would hide their own mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sam.mask_decoder.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "_proj.weight" in name:
                p.mul_(2)
            elif "norm" in name or name.startswith("output_upscaling.1"):
                p.add_(noise * 0.2)
            elif name.endswith("bias"):
                p.add_(noise * 0.1)
    return sam


def prompts(kind, count, side=SIDE):
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(count, 26, 2, generator=generator) * side
    labels = torch.randint(2, (count, 26), generator=generator)
    boxes = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1) * side
    masks = torch.randn(count, 1, side // 4, side // 4, generator=generator) * 5
    return {
        "one point": ((points[:, :1], labels[:, :1]), None, None),
        "two points": ((points[:, :2], labels[:, :2]), None, None),
        "eight points": ((points[:, :8], labels[:, :8]), None, None),
        "as many points as fit": ((points, labels), None, None),
        "box": (None, boxes, None),
        "point and box": ((points[:, :1], labels[:, :1]), boxes, None),
        "mask": (None, None, masks),
        "point and mask": ((points[:, :1], labels[:, :1]), None, masks),
        "everything": ((points[:, :3], labels[:, :3]), boxes, masks),
    }[kind]


def relative_rms(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
