"""Arguments for the ops of the mask decoder, made up: what the self-checks and the tests call them with."""

from __future__ import annotations

import torch

from .decode_sweeps import BASES, POSITIONAL, VALUES, decode_sweep0, decode_sweep1, decode_sweep2
from .decode_upscale import decode_upscale
from .pixel_tiles import pack_pixels, pack_values

__all__ = ["Arguments"]

SHAPE = (2, 3, 7, (8, 16), (8, 8), (64, 32))


class Arguments:
    """Random arguments of all four ops; scores, variances and logits of a sensible size.

    shape: images, prompts, tokens, (heads, width), grid, channels after the two convolutions; by default those of SAM
        on a grid of one tile, beyond which r1 and r2 would be undefined.
    dtype: of the bases.
    device: whose layout the bases have.
    """

    def __init__(self, shape=SHAPE, dtype=torch.float32, seed=0, device="cpu"):
        self.images, self.prompts, self.tokens, (self.heads, self.width), self.grid, channels = shape
        generator = torch.Generator().manual_seed(seed)
        self.pixels, self.inner, self.channels = self.grid[0] * self.grid[1], self.heads * self.width, 2 * 128
        (c1, c2), g, i = channels, self.prompts, self.inner

        def normal(*size, scale=1.0):
            return torch.randn(size, generator=generator) * scale

        rows = normal(self.images, len(BASES) * i + 4 * c1, self.pixels)
        tiles = -(-self.pixels // 64)
        self.bases = pack_pixels(rows.to(device), dtype)
        values = normal(self.images, len(VALUES), self.heads, self.width, self.pixels)
        self.values = pack_values(values.to(device), dtype)
        self.norms = torch.rand((self.images, 3, tiles * 64), generator=generator) * 100 + 400
        self.norms[:, 2] -= 450
        self.positional = pack_pixels(normal(1, len(POSITIONAL) * i, self.pixels).to(device), dtype)
        self.image = torch.randint(self.images, (g,), generator=generator)
        self.k0, self.v0, self.k1, self.v1, self.q = (normal(g, self.heads, self.tokens, self.width) for _ in range(5))
        maps = normal(11, i, i, scale=i**-0.5)
        for gram in (0, 4, 6):
            maps[gram] = maps[gram] @ maps[gram].T
        self.maps1, self.maps2 = maps[:3], maps[3:]
        self.bias, self.vectors = normal(i), normal(5, i)
        self.r1, self.r2 = (torch.rand((g, tiles * 64), generator=generator) + 0.5 for _ in range(2))
        counts = torch.randint(5, (g,), generator=generator)
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.hyper = normal(int(self.first[-1]), c2, scale=0.2)
        centre = torch.eye(c1) - 1 / c1
        convolution = normal(2, i, 4, c1, scale=i**-0.5) @ centre
        vectors = normal(2, 4, c1) @ centre
        norm = torch.stack([normal(c1) + 1, normal(c1)])
        self.upscaling = (convolution.flatten(2), vectors.flatten(1), norm, normal(4 * c2, c1, scale=0.2), normal(c2))

    def sweep0(self):
        return decode_sweep0, (self.bases, self.values, self.image, self.q, self.pixels)

    def sweep1(self):
        tokens = (self.k0, self.v0, self.q)
        shared = (self.bases, self.values, self.norms, self.positional, self.image)
        return decode_sweep1, (*shared, *tokens, self.maps1, self.bias, self.pixels, self.channels, 1e-5)

    def sweep2(self):
        tokens = (self.r1, self.k0, self.v0, self.k1, self.v1, self.q)
        shared = (self.bases, self.values, self.norms, self.positional, self.image)
        constants = (self.maps2, self.vectors, 2.5, self.pixels, self.channels, 1e-5)
        return decode_sweep2, (*shared, *tokens, *constants)

    def upscale(self):
        tokens = (self.r1, self.r2, self.k0, self.v0, self.k1, self.v1, self.hyper, self.first)
        arguments = (self.bases, self.positional, self.image, *tokens, self.maps2[0], *self.upscaling, *self.grid, 1e-6)
        return decode_upscale, arguments
