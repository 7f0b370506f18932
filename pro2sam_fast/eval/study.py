"""A study: several coarse models and matchings on one data set, written as tables, per-photo records and pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..api import load_coarse, load_sam
from ..data.localization import LocalizationDataset
from ..data.tables import open_image
from ..errors import ConfigError, DataError
from ..generator import MaskGenerator
from ..io import write_atomic
from ..models.gtformer import GTFormer
from ..models.lite import LabelHead, load_lite
from ..pipelines.pro2sam import resolve_device
from ..train.lite_gtformer import class_activation_map
from .baselines import BASELINES
from .contact_sheet import contact_sheet
from .gallery_cache import GalleryCache
from .localization import ERROR_TYPES, LocalizationAccuracy, box_accuracy, error_taxonomy
from .maps import (
    MapReport,
    PixelReport,
    Predictions,
    evaluate_maps,
    evaluate_pixels,
    predict_on_all_ranks,
    shared_classes,
)
from .masks import MaskReport, evaluate_masks
from .protocols import Protocol, protocol
from .ranks import gathered, ranks
from .table import write_records

__all__ = ["Study", "coarse_model", "external_scores"]

# options of matching, or of the generator
ABLATIONS = {
    "matching": [{"similarity": s} for s in ("bbox", "mask+bbox", "mask")],
    "threshold": [{"prompt_threshold": t} for t in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "points": [{"points_per_side": n} for n in (8, 16, 32)],
}


def coarse_model(name: str) -> tuple[nn.Module, Sequence[str]]:
    """A coarse model by name and the names of its classes, numbers if they are unknown.

    "lite", "cam" (class activation map of lite's trunk for its likeliest ImageNet class), a run of `pro2sam-fast
    train`, an official checkpoint, or with "cam:", "gradcam:" or "rollout:" before one of the last two its baseline of
    that name.
    """
    if name in ("cam", "lite"):
        lite = load_lite()
        return (_Cam(lite.classifier), lite.class_names) if name == "cam" else (lite.coarse, lite.coarse_class_names)
    kind, _, path = name.partition(":")
    baseline = BASELINES.get(kind) if path else None
    net, names = load_coarse(path if baseline else name)
    names = [str(i) for i in range(net.model.config.num_classes)] if names is None else names
    return baseline(net.model) if baseline else net.model, names


class _Cam(nn.Module):
    """Zhou et al. 2016; its logits are ImageNet's and stay out of the report."""

    def __init__(self, head: LabelHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.head.trunk.features(self.head.renormalise(x))[-1]
        return {"map": class_activation_map(self.head.trunk, features, classes=1)}


def external_scores(
    data: LocalizationDataset, file: str | None = None, timm_model: str | None = None, device: str = "auto"
) -> dict[str, np.ndarray] | None:
    """Class scores by photo id from a file (``.npz`` with ``ids`` and ``logits``) or a timm model with its weights.

    Raises:
        ConfigError: both are given, or timm doesn't know the model, or it has another number of classes.
        DataError: the file is malformed, or lacks a photo.
    """
    if file is not None and timm_model is not None:
        raise ConfigError("give class scores by file or by timm model, not both")
    if file is not None:
        try:
            with np.load(file) as arrays:
                scores = dict(zip(arrays["ids"].tolist(), arrays["logits"], strict=True))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{file}: expected an .npz file with ids and logits ({error}).") from error
        if missing := [p.id for p in data.photos if p.id not in scores]:
            raise DataError(f"{file}: {len(missing)} photos have no scores, the first is {missing[0]!r}.")
        return scores
    if timm_model is None:
        return None
    import timm

    try:
        model = timm.create_model(timm_model, pretrained=True).eval().to(resolve_device(device))
    except Exception as error:  # whatever timm and its hub raise
        raise ConfigError(f"timm can't give {timm_model!r} with weights: {error}") from error
    if model.num_classes != len(data.class_names):
        raise ConfigError(f"{timm_model} has {model.num_classes} classes, the data {len(data.class_names)}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    scores = {}
    rank, world = ranks()
    with torch.inference_mode():
        for photo in data.photos[rank::world]:
            x = transform(open_image(photo.path).convert("RGB")).unsqueeze(0)
            scores[photo.id] = model(x.to(next(model.parameters()).device))[0].float().cpu().numpy()
    return {key: value for part in gathered(scores) for key, value in part.items()}


class Study:
    """Collects reports and writes them.

    Args:
        data: photos with boxes, or with masks to measure PxAP on.
        folder: of the results.
        protocols: names of map protocols.
        threshold: of maps, chosen on other photos; None takes the best on these, called an oracle in the report.
        val: photos with boxes to choose it on, for every model and protocol.
        fixed: thresholds that are reported beside it.
        ablations: names of `ABLATIONS`, and "tokens", which lists the models by their number of query tokens.
        scores: class scores by photo id that replace the coarse models' own.
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
        self.batch_size, self.ten_crop, self.device = batch_size, ten_crop, resolve_device(device)
        self.maps: dict[tuple[str, str], MapReport] = {}
        self.pixels: dict[str, PixelReport] = {}
        self.masks: dict[str, MaskReport] = {}
        self.predictions: dict[str, Predictions] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.classes: dict[str, list[int]] = {}
        self.ablations, self.ablated = tuple(ablations), {name: [] for name in ABLATIONS if name in ablations}

    def add_maps(self, name: str) -> None:
        """Scores a coarse model's maps against boxes under all protocols, or against masks where photos have these."""
        model, class_names = coarse_model(name)
        model = model.eval().to(self.device)
        self.classes[name] = shared_classes(class_names, self.data.class_names)
        net = getattr(model, "net", model)
        if isinstance(net, GTFormer) and "tokens" in self.ablations:
            self.sizes[name] = net.config.num_query_tokens, sum(p.numel() for p in net.parameters())
        views: dict[int, Predictions] = {}
        if not any(photo.masks for photo in self.data.photos):
            for rules in self.protocols:
                if rules.resize not in views:
                    views[rules.resize] = self._predict(name, model, rules)
                self.maps[name, rules.name] = evaluate_maps(
                    views[rules.resize], self.data, rules, fixed=self.fixed, **self._threshold(name, model, rules)
                )
        # masks are matched, and pixels counted, in the whole photo
        whole = views[224] if 224 in views else self._predict(name, model, protocol("direct224"))
        self.predictions[name] = whole
        if not self.maps:
            self.pixels[name] = evaluate_pixels(whole, self.data)

    def _threshold(self, name: str, model: nn.Module, rules: Protocol) -> dict[str, Any]:
        if self.val is not None:
            held_out = evaluate_maps(self._predict(name, model, rules, self.val), self.val, rules)
            return {"selection": "val_split", "threshold": held_out.threshold}
        return {"selection": "oracle_sum" if self.threshold is None else "val_split", "threshold": self.threshold}

    def _predict(
        self, name: str, model: nn.Module, rules: Protocol, data: LocalizationDataset | None = None
    ) -> Predictions:
        test = data is None
        data = self.data if data is None else data
        found = predict_on_all_ranks(
            model,
            data,
            rules,
            batch_size=self.batch_size,
            device=self.device,
            ten_crop=self.ten_crop and self.scores is None,
            classes=self.classes[name],
        )
        if self.scores is not None and test:
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
        """Matches the maps of all coarse models with SAM's masks.

        Raises:
            ConfigError: the data has no boxes.
        """
        if self.pixels:
            raise ConfigError("chosen masks are measured by their boxes, which this data doesn't have")
        net, defaults = load_sam(sam, checkpoint)
        net = net.to(self.device)

        def cache(**changed: Any) -> GalleryCache:
            chosen = {**defaults, **(options or {}), **changed}
            return GalleryCache(MaskGenerator(net, **chosen), galleries, chosen)

        plain = cache()

        def add(label: str, coarse: str, source: GalleryCache, **matching: Any) -> None:
            found = self.predictions[coarse]
            self.masks[label] = evaluate_masks(found, self.data, source, matching=matching, sam_input=sam_input)

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
        summary: dict[str, Any] = {"photos": len(self.data), "maps": [], "pixels": [], "masks": []}
        parts = [f"# Localization accuracy on {len(self.data)} photos\n", *self._other_classes()]
        for (name, rules), report in self.maps.items():
            stem = f"photos_{_slug(name)}_{rules}"
            records = list(report.accuracy.records.values())
            write_records(self.folder / f"{stem}.csv", records)
            _write_curves(self.folder / f"{stem}_curves.csv", report.curves)
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
            write_records(self.folder / f"{stem}.csv", list(report.accuracy.records.values()))
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
        for name, report in self.pixels.items():
            stem = f"photos_{_slug(name)}_pixels"
            content = io.BytesIO()
            ids = np.array(self.predictions[name].ids)
            np.savez_compressed(content, ids=ids, foreground=report.foreground, background=report.background)
            write_atomic(self.folder / f"{stem}.npz", content.getvalue())
            _write_curves(self.folder / f"{stem}_curves.csv", report.curves)
            summary["pixels"].append({"coarse": name, "PxAP": report.pxap, "records": f"{stem}.npz"})
        parts += _map_tables(self.maps) + _pixel_table(self.pixels) + _mask_table(self.masks)
        parts += self._ablation_tables() + _error_table(summary)
        parts += self._pictures()
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=1).encode())
        path = self.folder / "report.md"
        write_atomic(path, "\n".join(parts).encode())
        return path

    def _other_classes(self) -> list[str]:
        if not (others := [f"`{name}`" for name, shared in self.classes.items() if not shared]):
            return []
        return [
            f"The {len(self.data.class_names)} classes of the data aren't among those of {', '.join(others)}. Its maps "
            "are taken as they are, those of class activation or Grad-CAM for the class that it finds likeliest. "
            "Localization needs no class, so GT-known and box accuracy are measured all the same; Top-1 and Top-5 only "
            "with class scores of another model.\n"
        ]

    def _ablation_tables(self) -> list[str]:
        # in the layouts of the Pro2SAM paper: Table 6 for masks, Table 5 for tokens
        parts = []
        ious = (0.5, 0.6, 0.7, 0.8, 0.9)
        for name, labels in self.ablated.items():
            rows = []
            for label in labels:
                accuracy = box_accuracy(list(self.masks[label].accuracy.records.values()), ious)
                rows.append([label, *(accuracy[f"box_acc@{t:g}"] for t in ious)])
            parts += [f"\n## Ablation: {name}\n", _table([name, *(f"IoU {100 * t:.0f}" for t in ious)], rows)]
        if self.sizes and self.maps:
            rows = []
            for (name, rules), report in self.maps.items():
                if name in self.sizes:
                    tokens, parameters = self.sizes[name]
                    values = (report.metrics.get(c, "") for c in ("Top-1 Loc", "Top-5 Loc", "GT-known"))
                    rows.append([name, rules, tokens, parameters / 1e6, *values])
            head = ["coarse", "protocol", "query tokens", "parameters (M)", "Top-1 Loc", "Top-5 Loc", "GT-known"]
            parts += ["\n## Query tokens\n", _table(head, sorted(rows, key=lambda r: (r[1], r[2])))]
        return parts

    def _errors(self, accuracy: LocalizationAccuracy) -> dict[str, float]:
        records = list(accuracy.records.values())
        return error_taxonomy(records, given_class=not all(r.top5 for r in records))

    def _pictures(self) -> list[str]:
        parts = []
        if self.maps and _plot_curves(self.maps, self.folder / "curves.png"):
            parts.append("\n## Accuracy against the threshold\n\n![curves](curves.png)\n")
        reports = self.masks or {f"{n} {p}": r for (n, p), r in self.maps.items()}
        if reports:
            name, report = next(iter(reports.items()))
            sheet = contact_sheet(list(report.accuracy.records.values()), self.data, report.accuracy.rules)
            sheet.save(self.folder / "best_and_worst.jpg", quality=88)
            parts.append(f"\n## Best and worst photos of {name}\n\n![photos](best_and_worst.jpg)\n")
        return parts


def _write_curves(path: Path, curves: Mapping[str, np.ndarray]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(curves)
    writer.writerows(zip(*(column.tolist() for column in curves.values())))
    write_atomic(path, text.getvalue().encode())


def _slug(name: str) -> str:
    kept = "".join(c if c.isalnum() else "-" for c in name)
    return "-".join(part for part in kept.split("-") if part)[-60:]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in row) + " |" for row in lines
    )


def _columns(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in metrics if not name.startswith("CorLoc")]


def _map_tables(reports: Mapping[tuple[str, str], MapReport]) -> list[str]:
    parts = []
    for rules in dict.fromkeys(r for _, r in reports):
        chosen = {name: report for (name, r), report in reports.items() if r == rules}
        columns = list(dict.fromkeys(c for report in chosen.values() for c in _columns(report.metrics)))
        rows = []
        for name, report in chosen.items():
            said = {"oracle_sum": "best on these photos (oracle)", "val_split": "chosen on others", "fixed": "fixed"}
            for threshold, what, metrics in (
                (report.threshold, said[report.selection], report.metrics),
                *((t, "fixed", m) for t, m in report.fixed.items()),
            ):
                rows.append([name, f"{threshold:g}", what, *(metrics.get(c, "") for c in columns)])
        p = protocol(rules)
        parts.append(
            f"\n## Maps alone, protocol `{rules}`\n\nView: {p.resize} cropped to {p.crop}; map: {p.map}; "
            f"box: {p.rule}; IoU counts widths as x1 - x0 + 1.\n"
        )
        parts.append(_table(["coarse", "threshold", "chosen", *columns], rows))
        if swept := [(name, sweep, r) for name, report in chosen.items() for sweep, r in report.sweeps.items()]:
            head = ["coarse", "metric", *(f"IoU {t}" for t in (30, 50, 70)), "mean"]
            parts.append("\nEach IoU at its own best of 1,000 thresholds; V2 takes every contour:\n")
            values = [[r.get(f"box_acc@{t:g}", "") for t in (0.3, 0.5, 0.7)] + [r["MaxBoxAcc"]] for _, _, r in swept]
            parts.append(_table(head, [[name, sweep, *v] for (name, sweep, _), v in zip(swept, values)]))
    return parts


def _pixel_table(reports: Mapping[str, PixelReport]) -> list[str]:
    if not reports:
        return []
    head = "\n## Maps against masks, protocol `wsoleval`\n\nPxAP at 224 x 224, the pixels of all photos pooled.\n"
    return [head, _table(["coarse", "PxAP"], [[name, report.pxap] for name, report in reports.items()])]


def _mask_table(reports: Mapping[str, MaskReport]) -> list[str]:
    if not reports:
        return []
    columns = list(dict.fromkeys(c for report in reports.values() for c in _columns(report.metrics)))
    rows = [[n, *(r.metrics.get(c, "") for c in columns), r.sources.get("sam", 0)] for n, r in reports.items()]
    head = "\n## Maps matched with SAM's masks, protocol `mask`\n\nBox of the chosen mask in a 224 x 224 view.\n"
    return [head, _table(["coarse", *columns, "photos with a mask of SAM"], rows)]


def _error_table(summary: Mapping[str, Any]) -> list[str]:
    if not summary["maps"]:
        return []
    rows = [
        [entry["coarse"], entry["protocol"], *(entry["errors"][kind] for kind in ERROR_TYPES)]
        for entry in [*summary["maps"], *summary["masks"]]
    ]
    return ["\n## Where it went wrong (percent of photos)\n", _table(["coarse", "protocol", *ERROR_TYPES], rows)]


def _plot_curves(reports: Mapping[tuple[str, str], MapReport], path: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ious = np.arange(0.3, 0.96, 0.05)
    for (name, rules), report in reports.items():
        curve = report.curves["box_acc@0.5"]
        left.plot(report.curves["threshold"], curve, label=f"{name}, {rules}")
        values = np.array([r.iou for r in report.accuracy.records.values()])
        right.plot(ious, [100 * (values >= t).mean() for t in ious])
    left.set(xlabel="threshold", ylabel="photos with IoU ≥ 0.5 (%)", ylim=(0, 100))
    right.set(xlabel="IoU", ylabel="photos that reach it (%)", ylim=(0, 100))
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True
