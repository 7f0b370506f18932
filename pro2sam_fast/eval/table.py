"""The table of an evaluation, one row a photo: everything a report says can be computed from it again. As CSV, and as
Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.tables import lines
from ..errors import ConfigError, DataError
from ..io import write_atomic
from .localization import Record

__all__ = ["parquet", "read_records", "write_parquet", "write_records"]

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


def parquet():
    """The module pyarrow.parquet; ConfigError names what to install if it isn't there."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError('Parquet files need pyarrow: pip install "pro2sam-fast[parquet]".') from error
    return pyarrow.parquet


def write_parquet(path: str | Path, records: Sequence[Record]) -> None:
    """The same as Parquet: lists are lists, class_boxes is JSON, IoUs per threshold are the column "ious"."""
    module = parquet()
    import pyarrow

    number, box = pyarrow.float64(), pyarrow.list_(pyarrow.float64())
    kinds = (pyarrow.string(), pyarrow.int64(), pyarrow.list_(pyarrow.int64()), pyarrow.list_(box), box, number)
    kinds += (pyarrow.string(), pyarrow.string(), box)
    schema = pyarrow.schema(list(zip((*COLUMNS, "ious"), kinds, strict=True)))
    rows = [
        {
            **{name: getattr(r, name) for name in ("id", "label", "iou", "source")},
            "top5": list(r.top5),
            "boxes": r.boxes.tolist(),
            "box": list(r.box),
            "class_boxes": json.dumps({str(k): list(v) for k, v in r.class_boxes.items()}),
            "ious": None if r.ious is None else r.ious.tolist(),
        }
        for r in records
    ]
    content = io.BytesIO()
    module.write_table(pyarrow.Table.from_pylist(rows, schema), content)
    write_atomic(Path(path), content.getvalue())


def _read_parquet(path: Path) -> list[Record]:
    module = parquet()
    import pyarrow

    try:
        rows = module.read_table(path).to_pylist()
        return [
            Record(
                **{name: row[name] for name in ("id", "label", "iou", "source")},
                top5=tuple(row["top5"]),
                boxes=np.array(row["boxes"], dtype=np.float64).reshape(-1, 4),
                box=tuple(row["box"]),
                class_boxes={int(k): tuple(v) for k, v in json.loads(row["class_boxes"]).items()},
                ious=None if row["ious"] is None else np.array(row["ious"]),
            )
            for row in rows
        ]
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a table of an evaluation ({error}).") from error


def read_records(path: str | Path) -> list[Record]:
    """What `write_records` or, in a file named .parquet, `write_parquet` wrote; DataError names a malformed line."""
    path = Path(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
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
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error}.") from error
        records.append(record)
    return records
