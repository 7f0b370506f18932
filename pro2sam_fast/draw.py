"""Pictures of results, with Pillow: the object in colour on a dimmed photo, mask contour, box and caption; and mask
galleries.

Line widths and type scale with the photo, so a 1x1 and a 24-megapixel picture come out alike.
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = ["draw_gallery", "draw_localization"]

ACCENT = (255, 196, 0)
INK = (20, 20, 24)
_SMALLEST_CAPTION = 40  # px; a photo with a shorter side gets no caption, it would cover the object


def draw_localization(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    box: tuple[float, float, float, float] | None = None,
    caption: str = "",
    *,
    color: tuple[int, int, int] = ACCENT,
    dim: float = 0.55,
) -> Image.Image:
    """Draw one localisation.

    image: uint8 (H, W, 3) RGB. mask: bool (H, W). box: x0, y0, x1, y1 in pixels, half-open. caption: one line, drawn
    at the box (or at the top left without one). dim: how far the background goes towards dark grey, 0 (not at all) to
    1. Returns an RGB Pillow image of the same size.
    """
    canvas = Image.fromarray(np.ascontiguousarray(image))
    width = _line_width(canvas.size)
    if mask is not None:
        canvas = _dim_background(canvas, mask, dim)
        canvas = _stroke_contour(canvas, mask, width, color)
    if box is not None:
        _stroke_box(canvas, box, width, color)
    if caption:
        _draw_caption(canvas, caption, box or (0, 0, *canvas.size), width, color)
    return canvas


def draw_gallery(image: np.ndarray, masks, *, opacity: float = 0.5) -> Image.Image:
    """Paint every mask of a gallery in its own colour, smaller masks on top, with thin light outlines, on the photo in
    grey: all colour comes from masks.

    image: uint8 (H, W, 3) RGB. masks: iterable of (x, y, bool (h, w)) patches: a mask cropped to where it is set and
    the place of its upper left corner. opacity: of the fill, 0..1.
    """
    height, width = image.shape[:2]
    index = np.zeros((height, width), np.int32)
    least = np.full((height, width), height * width, np.int64)  # pixels of the mask on top
    sizes = []
    for number, (x, y, patch) in enumerate(masks, 1):
        patch = np.asarray(patch, bool)
        sizes.append(int(patch.sum()))
        at = np.s_[int(y) : int(y) + patch.shape[0], int(x) : int(x) + patch.shape[1]]
        top = patch & (least[at] >= sizes[-1])
        index[at][top], least[at][top] = number, sizes[-1]
    rank = np.zeros(len(sizes) + 1, np.int32)
    rank[1 + np.argsort([-size for size in sizes], kind="stable")] = np.arange(1, len(rank))
    index = rank[index]
    fill = np.asarray(_palette(len(sizes)), np.uint8)[index]
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L").convert("RGB"))
    painted = np.where((index > 0)[:, :, None], _mix(grey, fill, opacity), grey)
    edges = np.zeros((height, width), bool)
    edges[:, 1:] |= index[:, 1:] != index[:, :-1]
    edges[1:] |= index[1:] != index[:-1]
    canvas = Image.fromarray(painted)
    thickness = max(1, _line_width(canvas.size) // 2)
    line = Image.fromarray(edges)
    if thickness > 1:
        line = line.convert("L").filter(ImageFilter.MaxFilter(2 * (thickness // 2) + 1))
    canvas.paste((255, 255, 255), mask=line.convert("L").point(lambda value: value * 3 // 4))
    return canvas


def _line_width(size: tuple[int, int]) -> int:
    return max(1, round(0.004 * max(size)))


def _mix(image: np.ndarray, fill: np.ndarray, opacity: float) -> np.ndarray:
    weight = round(opacity * 256)
    return ((image.astype(np.uint16) * (256 - weight) + fill.astype(np.uint16) * weight) >> 8).astype(np.uint8)


def _palette(count: int) -> list[tuple[int, int, int]]:
    """Index 0 (no mask), then `count` colours whose hues are a golden angle apart, so that neighbours differ."""
    colors = [(0, 0, 0)]
    for number in range(count):
        hue = (0.08 + number * 0.61803398875) % 1.0
        value = colorsys.hsv_to_rgb(hue, 0.75 - 0.25 * (number % 3 == 1), 1.0 - 0.25 * (number % 3 == 2))
        colors.append(tuple(round(255 * channel) for channel in value))
    return colors


def _dim_background(canvas: Image.Image, mask: np.ndarray, dim: float) -> Image.Image:
    if not 0 <= dim <= 1:
        raise ValueError(f"dim={dim} is outside 0..1")
    grey = canvas.convert("L").convert("RGB")
    background = Image.blend(canvas, grey, 0.6 * dim).point(lambda value: round(value * (1 - dim) + 16 * dim))
    return Image.composite(canvas, background, Image.fromarray(mask.astype(bool)).convert("L"))


def _stroke_contour(canvas: Image.Image, mask: np.ndarray, width: int, color: tuple[int, int, int]) -> Image.Image:
    """A band of `width` px along the mask's edge, a dark seam outside for contrast on any photo.

    For a mask blurred with standard deviation s, the value at signed distance d from a straight edge is Phi(d / s):
    bands of constant distance are bands of constant value, smooth along the contour. Details thinner than s blur away,
    so the exact one-pixel inner boundary is added.
    """
    binary = mask.astype(bool)
    sigma = float(width)
    soft = Image.fromarray(binary.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(sigma))
    seam = soft.point(_band(0.04, 0.60, 0.5))
    line = soft.point(_band(0.31, 0.69, 1.0)) if width > 1 else Image.new("L", canvas.size, 0)
    exact = Image.fromarray(_inner_boundary(binary)).convert("L")
    canvas.paste(INK, mask=seam)
    canvas.paste(color, mask=line)
    canvas.paste(color, mask=exact)
    return canvas


def _band(low: float, high: float, peak: float) -> list[int]:
    """Opacity (256 levels) that is `peak` for blurred values in low..high and falls to 0 over a short ramp outside."""
    value = np.arange(256) / 255
    ramp = 0.12
    rising = np.clip((value - low) / min(ramp, low) + 1, 0, 1)
    falling = np.clip((high - value) / min(ramp, 1 - high) + 1, 0, 1)
    opacity = np.minimum(rising, falling) * peak * 255
    opacity[[0, -1]] = 0
    return opacity.round().astype(int).tolist()


def _inner_boundary(mask: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels of the mask with a 4-neighbour inside the frame that isn't in the mask."""
    inside = mask.copy()
    inside[1:] &= mask[:-1]
    inside[:-1] &= mask[1:]
    inside[:, 1:] &= mask[:, :-1]
    inside[:, :-1] &= mask[:, 1:]
    return mask & ~inside


def _stroke_box(canvas: Image.Image, box, width: int, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = (round(value) for value in box)
    x0, y0 = min(max(x0, 0), canvas.width - 1), min(max(y0, 0), canvas.height - 1)
    x1, y1 = min(max(x1, x0 + 1), canvas.width), min(max(y1, y0 + 1), canvas.height)
    draw = ImageDraw.Draw(canvas, "RGBA")
    outside = max(1, width // 2)
    radius = min(3 * width, (x1 - x0) // 4, (y1 - y0) // 4)
    frame = (x0 - outside, y0 - outside, x1 - 1 + outside, y1 - 1 + outside)
    draw.rounded_rectangle(frame, radius, outline=(*INK, 110), width=width + 2 * outside)
    draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius, outline=(*color, 255), width=width)


def _draw_caption(canvas: Image.Image, text: str, box, width: int, color: tuple[int, int, int]) -> None:
    if min(canvas.size) < _SMALLEST_CAPTION:
        return
    text = " ".join(text.split())
    draw = ImageDraw.Draw(canvas, "RGBA")
    size = max(11, round(0.028 * max(canvas.size)))
    margin = 2 * width
    room = canvas.width - 2 * margin
    font = ImageFont.load_default(size)
    while size > 8 and draw.textlength(text, font) + size > room:
        size -= 1
        font = ImageFont.load_default(size)
    while len(text) > 1 and draw.textlength(text, font) + size > room:
        text = text[:-2].rstrip() + "…"
    left, _, right, _ = draw.textbbox((0, 0), text, font, anchor="ls")
    ascent, descent = font.getmetrics()
    pad = round(0.35 * size)
    tag_width, tag_height = right - left + 2 * pad, ascent + descent + pad
    x = min(max(round(box[0]), margin), max(margin, canvas.width - margin - tag_width))
    y = round(box[1]) - tag_height - width
    if y < margin:  # no room above the box: put it inside
        y = min(max(round(box[1]) + 2 * width, margin), max(0, canvas.height - tag_height))
    draw.rounded_rectangle((x, y, x + tag_width, y + tag_height), tag_height // 4, fill=(*color, 255))
    draw.text((x + pad - left, y + pad // 2 + ascent), text, font=font, fill=(*INK, 255), anchor="ls")
