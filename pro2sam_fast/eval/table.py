"""The table of an evaluation, one row a photo: everything a report says can be computed from it again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.tables import lines
from ..errors import DataError
from ..io import write_atomic
from .localization import Record

__all__ = ["read_records", "write_records"]

COLUMNS = ("id", "label", "top5", "boxes", "box", "iou", "source", "class_boxes")


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """A CSV with one row a photo; lists are JSON. IoUs per threshold go to a float64 ``.npy`` file beside it."""
    path = Path(path)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for r in records:
        lists = [json.dumps(x) for x in (list(r.top5), r.boxes.tolist(), list(r.box))]
        class_boxes = json.dumps({str(k): list(v) for k, v in r.class_boxes.items()})
        writer.writerow([r.id, r.label, *lists, repr(r.iou), r.source, class_boxes])
    write_atomic(path, text.getvalue().encode())
    if records and all(r.ious is not None for r in records):
        content = io.BytesIO()
        np.save(content, np.stack([r.ious for r in records]))
        write_atomic(path.with_suffix(".npy"), content.getvalue())


def read_records(path: str | Path) -> list[Record]:
    """What `write_records` wrote; DataError names a malformed line."""
    path = Path(path)
    rows = list(csv.reader(lines(path)))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise DataError(f"{path}, line 1: expected the columns {', '.join(COLUMNS)}.")
    sweep = path.with_suffix(".npy")
    ious = np.load(sweep) if sweep.exists() else None
    if ious is not None and len(ious) != len(rows) - 1:
        raise DataError(f"{sweep}: holds {len(ious)} photos, {path.name} {len(rows) - 1}.")
    records = []
    for number, row in enumerate(rows[1:], 2):
        try:
            key, label, top5, boxes, box, iou, source, class_boxes = row
            record = Record(
                key,
                int(label),
                np.array(json.loads(boxes), dtype=np.float64).reshape(-1, 4),
                tuple(json.loads(box)),
                float(iou),
                tuple(json.loads(top5)),
                source,
                None if ious is None else ious[number - 2],
                {int(k): tuple(v) for k, v in json.loads(class_boxes).items()},
            )
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}.") from error
        records.append(record)
    return records
