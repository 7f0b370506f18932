"""Small ViT image encoders with every option, for the fast forms of their inference."""

import torch
from torch import nn

from pro2sam_fast.models.sam.image_encoder import ImageEncoderViT

# windows that divide the grid, or leave a row, a column or most of a window over; several heads; odd head widths
CONFIGS = {
    "window 5 of 6": {"img_size": 96, "window_size": 5},
    "window 4 of 8": {"img_size": 128, "window_size": 4},
    "window larger than the grid": {"img_size": 48, "window_size": 14},
    "no relative positions": {"img_size": 96, "window_size": 4, "use_rel_pos": False},
    "no bias": {"img_size": 96, "window_size": 4, "qkv_bias": False},
    "other activation": {"img_size": 64, "window_size": 3, "act": nn.ReLU},
    "heads of 5": {"img_size": 96, "window_size": 4, "embed_dim": 30, "num_heads": 6},
}


def make(**options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "out_chans": 16, "global_attn_indexes": (1,), **options}
    encoder = ImageEncoderViT(**sizes).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name or name.endswith("bias"):
                parameter.normal_(std=0.3)
    return encoder
