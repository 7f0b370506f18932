"""A study: several coarse models and matchings on one data set, written as tables, per-photo records and pictures."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..api import load_sam
from ..data.localization import LocalizationDataset
from ..errors import ConfigError
from ..generator import MaskGenerator
from ..io import write_atomic
from ..pipelines.pro2sam import resolve_device
from . import table
from .coarse import coarse_model, model_facts
from .contact_sheet import contact_sheet
from .gallery_cache import GalleryCache
from .localization import IOUS, LocalizationAccuracy, box_accuracy, error_taxonomy
from .maps import (
    MapReport,
    PixelReport,
    Predictions,
    evaluate_maps,
    evaluate_pixels,
    predict_on_all_ranks,
    shared_classes,
)
from .masks import MaskReport, evaluate_mask_pixels, evaluate_masks
from .protocols import Protocol, protocol
from .ranks import ranks
from .report import error_table, map_tables, markdown, mask_table, pixel_table, plot_curves, write_curves
from .stored import load_maps, save_maps

__all__ = ["Study"]

# of masks: options of matching, or of the generator
ABLATIONS = {
    "matching": [{"similarity": s} for s in ("bbox", "mask+bbox", "mask")],
    "threshold": [{"prompt_threshold": t} for t in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "points": [{"points_per_side": n} for n in (8, 16, 32)],
}
# of models: what tells them apart, and the metrics that the Pro2SAM paper's Tables 3, 4 and 5 have
MODEL_ABLATIONS = {
    "attention": (("foreground from",), ("Top-1 Loc", "GT-known")),
    "losses": (("loss scheme", "λ1 : λ2"), ("Top-1 Loc", "GT-known")),
    "tokens": (("query tokens", "parameters (M)"), ("Top-1 Loc", "Top-5 Loc", "GT-known")),
}

_Predict = Callable[[Protocol, LocalizationDataset], Predictions]


class Study:
    """Collects reports and writes them.

    Args:
        data: photos with boxes, or with masks to measure PxAP on.
        folder: of the results.
        protocols: names of map protocols.
        threshold: of maps, chosen on other photos; None takes the best on these, called an oracle in the report.
        val: photos with boxes to choose it on, for every model and protocol.
        fixed: thresholds that are reported beside it.
        ablations: names of `ABLATIONS`, and of `MODEL_ABLATIONS`, which list the models by what they are.
        scores: class scores by photo id that replace the coarse models' own.
        iou_set, iou: see `evaluate_maps`.
        save_maps: keep the maps in ``maps``, to be read as "maps:" and that folder.
        parquet: per-photo records as Parquet, too.
        batch_size, ten_crop, device: see `predict_maps`.

    Under torchrun every rank adds the same models and shares the photos; rank 0 writes.
    """

    def __init__(
        self,
        data: LocalizationDataset,
        folder: str | Path,
        *,
        protocols: Sequence[str] = ("sat",),
        threshold: float | None = None,
        val: LocalizationDataset | None = None,
        fixed: Sequence[float] = (0.3, 0.4),
        ablations: Sequence[str] = (),
        scores: Mapping[str, np.ndarray] | None = None,
        iou_set: Sequence[float] = (0.5, 0.7, 0.9),
        iou: str = "plus1",
        save_maps: bool = False,
        parquet: bool = False,
        batch_size: int = 32,
        ten_crop: bool = False,
        device: str = "auto",
    ) -> None:
        self.data, self.folder = data, Path(folder)
        self.protocols = [protocol(name) for name in protocols]
        if any(p.map is None for p in self.protocols):
            raise ConfigError(
                "the mask protocol is that of masks; ask for maps under sat, direct224, wsoleval or tscam"
            )
        if threshold is not None and val is not None:
            raise ConfigError("give a threshold or photos to choose it on, not both")
        self.threshold, self.val, self.fixed, self.scores = threshold, val, fixed, scores
        if not iou_set or not all(0 < t <= 1 for t in iou_set):
            raise ConfigError(f"the IoUs of box accuracy must lie in (0, 1], got {', '.join(map(str, iou_set))}")
        if iou not in IOUS:
            raise ConfigError(f"iou must be one of {', '.join(IOUS)}, got {iou!r}")
        self.measure = {"iou_set": tuple(iou_set), "iou": iou}
        self.save_maps, self.parquet = save_maps, parquet
        if parquet:
            table.parquet()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size!r}")
        self.batch_size, self.ten_crop, self.device = batch_size, ten_crop, resolve_device(device)
        self.maps: dict[tuple[str, str], MapReport] = {}
        self.pixels: dict[str, PixelReport] = {}
        self.masks: dict[str, MaskReport] = {}
        self.predictions: dict[str, Predictions] = {}
        self.facts: dict[str, dict[str, tuple]] = {}
        self.classes: dict[str, list[int]] = {}
        self.ablations, self.ablated = tuple(ablations), {name: [] for name in ABLATIONS if name in ablations}

    def add_maps(self, name: str) -> None:
        """Scores a coarse model's maps against boxes under all protocols, or against masks where photos have these."""
        predict = _once_a_view(self._stored(name) if name.startswith("maps:") else self._model(name))
        if not any(photo.masks for photo in self.data.photos):
            for rules in self.protocols:
                chosen = self._threshold(predict, rules)
                self.maps[name, rules.name] = evaluate_maps(
                    predict(rules, self.data), self.data, rules, fixed=self.fixed, **chosen, **self.measure
                )
        # masks are matched, and pixels counted, in the whole photo
        whole = predict(protocol("direct224"), self.data)
        self.predictions[name] = whole
        if not self.maps:
            self.pixels[name] = evaluate_pixels(whole, self.data)

    def _threshold(self, predict: _Predict, rules: Protocol) -> dict[str, Any]:
        if self.val is not None:
            held_out = evaluate_maps(predict(rules, self.val), self.val, rules, iou=self.measure["iou"])
            return {"selection": "val_split", "threshold": held_out.threshold}
        return {"selection": "oracle_sum" if self.threshold is None else "val_split", "threshold": self.threshold}

    def _stored(self, name: str) -> _Predict:
        def predict(rules: Protocol, data: LocalizationDataset) -> Predictions:
            return self._scored(load_maps(name.partition(":")[2], data, rules), data)

        return predict

    def _model(self, name: str) -> _Predict:
        model, class_names = coarse_model(name)
        model = model.eval().to(self.device)
        self.classes[name] = shared_classes(class_names, self.data.class_names)
        self.facts[name] = model_facts(name, model)

        def predict(rules: Protocol, data: LocalizationDataset) -> Predictions:
            found = predict_on_all_ranks(
                model,
                data,
                rules,
                batch_size=self.batch_size,
                device=self.device,
                ten_crop=self.ten_crop and self.scores is None,
                classes=self.classes[name],
            )
            if self.save_maps and data is self.data and ranks()[0] == 0:
                save_maps(self.folder / "maps" / _slug(name), found, rules)
            return self._scored(found, data)

        return predict

    def _scored(self, found: Predictions, data: LocalizationDataset) -> Predictions:
        if self.scores is not None and data is self.data:
            found.scores = np.stack([self.scores[key] for key in found.ids])
        return found

    def add_masks(
        self,
        sam: str | None = None,
        checkpoint: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        sam_input: int | str = 224,
        galleries: str | Path | None = None,
    ) -> None:
        """Matches the maps of all coarse models with SAM's masks, which are measured by their boxes, or by their pixels
        where the data has masks."""
        net, defaults = load_sam(sam, checkpoint)
        net = net.to(self.device)

        def cache(**changed: Any) -> GalleryCache:
            chosen = {**defaults, **(options or {}), **changed}
            return GalleryCache(MaskGenerator(net, **chosen), galleries, chosen)

        plain = cache()

        def add(label: str, coarse: str, source: GalleryCache, **matching: Any) -> None:
            found, options = self.predictions[coarse], {"matching": matching, "sam_input": sam_input}
            if coarse in self.pixels:
                self.pixels[f"{label}, matched"] = evaluate_mask_pixels(found, self.data, source, **options)
            else:
                self.masks[label] = evaluate_masks(found, self.data, source, **options, **self.measure)

        for coarse in self.predictions:
            add(coarse, coarse, plain)
            for name in self.ablated:
                for choice in ABLATIONS[name]:
                    ((option, value),) = choice.items()
                    label = f"{coarse}, {option} {value}"
                    if name == "points":
                        add(label, coarse, cache(**choice))
                    else:
                        add(label, coarse, plain, **choice)
                    self.ablated[name].append(label)

    def write(self) -> Path:
        """Writes everything and returns the path of ``report.md``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        summary: dict[str, Any] = {"photos": len(self.data), **self.measure, "maps": [], "pixels": [], "masks": []}
        parts = [f"# Localization accuracy on {len(self.data)} photos\n", *self._other_classes()]
        for (name, rules), report in self.maps.items():
            stem = f"photos_{_slug(name)}_{rules}"
            self._write_records(stem, report.accuracy)
            write_curves(self.folder / f"{stem}_curves.csv", report.curves)
            summary["maps"].append(
                {
                    "coarse": name,
                    "protocol": rules,
                    "threshold": report.threshold,
                    "selection": report.selection,
                    "metrics": report.metrics,
                    "fixed": {f"{t:g}": m for t, m in report.fixed.items()},
                    "sweeps": report.sweeps,
                    "errors": self._errors(report.accuracy),
                    "records": f"{stem}.csv",
                }
            )
        for name, report in self.masks.items():
            stem = f"photos_{_slug(name)}_mask"
            self._write_records(stem, report.accuracy)
            summary["masks"].append(
                {
                    "coarse": name,
                    "protocol": "mask",
                    "metrics": report.metrics,
                    "sources": report.sources,
                    "errors": self._errors(report.accuracy),
                    "records": f"{stem}.csv",
                }
            )
        ids = np.array([photo.id for photo in self.data.photos])
        for name, report in self.pixels.items():
            stem = f"photos_{_slug(name)}_pixels"
            content = io.BytesIO()
            np.savez_compressed(content, ids=ids, foreground=report.foreground, background=report.background)
            write_atomic(self.folder / f"{stem}.npz", content.getvalue())
            write_curves(self.folder / f"{stem}_curves.csv", report.curves)
            summary["pixels"].append({"coarse": name, "PxAP": report.pxap, "records": f"{stem}.npz"})
        parts += map_tables(self.maps, self.measure["iou"]) + pixel_table(self.pixels) + mask_table(self.masks)
        parts += self._ablation_tables() + error_table(summary)
        parts += self._pictures()
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=1).encode())
        path = self.folder / "report.md"
        write_atomic(path, "\n".join(parts).encode())
        return path

    def _write_records(self, stem: str, accuracy: LocalizationAccuracy) -> None:
        records = list(accuracy.records.values())
        table.write_records(self.folder / f"{stem}.csv", records)
        if self.parquet:
            table.write_parquet(self.folder / f"{stem}.parquet", records)

    def _other_classes(self) -> list[str]:
        if not (others := [f"`{name}`" for name, shared in self.classes.items() if not shared]):
            return []
        return [
            f"The {len(self.data.class_names)} classes of the data aren't among those of {', '.join(others)}. Maps "
            "are taken as they are, those of class activation or Grad-CAM for the class found likeliest. "
            "Localization needs no class, so GT-known and box accuracy are measured all the same; Top-1 and Top-5 only "
            "with class scores of another model.\n"
        ]

    def _ablation_tables(self) -> list[str]:
        # in the layouts of the Pro2SAM paper: Table 6 for masks, Tables 3 to 5 for models
        parts = []
        ious = (0.5, 0.6, 0.7, 0.8, 0.9)
        for name, labels in self.ablated.items() if self.masks else ():
            rows = []
            for label in labels:
                accuracy = box_accuracy(list(self.masks[label].accuracy.records.values()), ious)
                rows.append([label, *(accuracy[f"box_acc@{t:g}"] for t in ious)])
            parts += [f"\n## Ablation: {name}\n", markdown([name, *(f"IoU {100 * t:.0f}" for t in ious)], rows)]
        for ablation in (name for name in MODEL_ABLATIONS if name in self.ablations):
            columns, metrics = MODEL_ABLATIONS[ablation]
            rows = [
                [name, rules, *self.facts[name][ablation], *(report.metrics.get(m, "") for m in metrics)]
                for (name, rules), report in self.maps.items()
                if ablation in self.facts.get(name, ())
            ]
            if rows:
                head = ["coarse", "protocol", *columns, *metrics]
                rows.sort(key=lambda row: (row[1], *row[2 : 2 + len(columns)]))
                parts += [f"\n## Ablation: {ablation}\n", markdown(head, rows)]
        return parts

    def _errors(self, accuracy: LocalizationAccuracy) -> dict[str, float]:
        records = list(accuracy.records.values())
        return error_taxonomy(records, given_class=not all(r.top5 for r in records))

    def _pictures(self) -> list[str]:
        parts = []
        if self.maps and plot_curves(self.maps, self.folder / "curves.png"):
            parts.append("\n## Accuracy against the threshold\n\n![curves](curves.png)\n")
        reports = self.masks or {f"{n} {p}": r for (n, p), r in self.maps.items()}
        if reports:
            name, report = next(iter(reports.items()))
            sheet = contact_sheet(list(report.accuracy.records.values()), self.data, report.accuracy.rules)
            sheet.save(self.folder / "best_and_worst.jpg", quality=88)
            parts.append(f"\n## Best and worst photos of {name}\n\n![photos](best_and_worst.jpg)\n")
        return parts


def _once_a_view(predict: _Predict) -> _Predict:
    """Protocols of the same view share its predictions."""
    found: dict[tuple[int, int], Predictions] = {}

    def once(rules: Protocol, data: LocalizationDataset) -> Predictions:
        key = id(data), rules.resize
        if key not in found:
            found[key] = predict(rules, data)
        return found[key]

    return once


def _slug(name: str) -> str:
    """Part of a file's name; of long ones the end, which alone may be that of others."""
    kept = "".join(c if c.isalnum() else "-" for c in name)
    slug = "-".join(part for part in kept.split("-") if part)
    return slug if len(slug) <= 60 else f"{slug[-51:]}-{zlib.crc32(name.encode()):08x}"


