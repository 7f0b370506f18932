"""A picture of the best and worst photos of an evaluation, annotated and predicted boxes drawn in."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..data.localization import LocalizationDataset
from ..data.tables import open_image
from ..data.views import TestView
from .localization import Record
from .protocols import Protocol

__all__ = ["contact_sheet"]

ANNOTATED, PREDICTED = (60, 220, 90), (255, 70, 60)


def contact_sheet(
    records: Sequence[Record], data: LocalizationDataset, rules: Protocol, columns: int = 6, rows: int = 2
) -> Image.Image:
    """The photos with the highest IoU in the upper half, those with the lowest in the lower one.

    Args:
        records: of photos of ``data``, boxes in the protocol's view.
        columns, rows: photos a line, lines a half.
    """
    ordered = sorted(records, key=lambda r: (-r.iou, r.id))
    half = columns * rows
    best, worst = ordered[:half], ordered[half:][-half:]
    view = TestView(rules.resize, rules.crop)
    paths = {photo.id: photo.path for photo in data.photos}
    side, gap = rules.crop, 4
    lines = [part[i : i + columns] for part in (best, worst) for i in range(0, len(part), columns)]
    size = (columns * (side + gap) + gap, len(lines) * (side + gap) + gap)
    sheet = Image.new("RGB", size, (24, 24, 24))
    for y, line in enumerate(lines):
        for x, record in enumerate(line):
            tile = view.window(open_image(paths[record.id]).convert("RGB"))
            draw = ImageDraw.Draw(tile)
            for box in record.boxes.tolist():
                _rectangle(draw, box, ANNOTATED)
            _rectangle(draw, record.box, PREDICTED)
            draw.text((4, 4), f"{record.iou:.2f}", fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0))
            sheet.paste(tile, (gap + x * (side + gap), gap + y * (side + gap)))
    return sheet


def _rectangle(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    if x1 >= x0 and y1 >= y0:
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
