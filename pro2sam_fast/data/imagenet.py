"""ImageNet-1k: the photos of ILSVRC for localization, or any of them in one folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from ..errors import ConfigError, DataError
from .annotations import ilsvrc_boxes, with_boxes
from .labelled import (
    WNID,
    LabelledPhoto,
    LocalizationDataset,
    check_split,
    class_folders,
    class_key,
    folders,
    is_photo,
    photos_in,
)
from .tables import class_index, convert, lines, require_files, rows

__all__ = ["ILSVRC", "FlatFolder"]


class ILSVRC(LocalizationDataset):
    """ImageNet-1k for localization; classes are WordNet ids in ascending order: the folders of ``root/train``, or those
    that ``boxes`` names where there is no such folder.

    train: ``root/train/<wnid>/*``. val: ``root/val`` holds the photos, in one folder or by class.

    Args:
        root: see above; the folder may cover fewer classes.
        split: "train" or "val".
        boxes: annotations of val: a folder with one XML a photo; a CSV with the header ImageId,PredictionString and
            groups of ``wnid xmin ymin xmax ymax``; or a ``.txt`` whose lines are those of SAT's val_gt.txt,
            ``<wnid>\\\\<file> <W> <H> ; x0 y0 x1 y1 ...``, or TS-CAM's, ``<wnid>/<file> <label> x0 y0 x1 y1 ...``. They
            also give the labels of val photos.
        val_list: labels of val photos instead of those from ``boxes``: lines ``<wnid>/<file>;<label>``; or the
            devkit's ground truth, whose line n is the class of ILSVRC2012_val_<n> by the devkit's own numbers, with the
            devkit's meta.mat or map_clsloc.txt beside it.
    """

    single_precision = True

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        boxes: str | Path | None = None,
        val_list: str | Path | None = None,
        **options: Any,
    ) -> None:
        root = Path(root)
        if check_split(split, ("train", "val")) == "train":
            wnids = [p.name for p in folders(root / "train")]
            super().__init__(class_folders(root / "train", wnids), wnids, **options)
            return
        if boxes is None and val_list is None:
            raise ConfigError("the val split of ILSVRC needs boxes (XML folder or CSV) or val_list for its labels")
        known = ilsvrc_boxes(Path(boxes)) if boxes is not None else {}
        if (root / "train").is_dir():
            wnids = [p.name for p in folders(root / "train")]
        elif known:
            wnids = sorted({wnid for wnid, _ in known.values()})
        else:
            wnids = sorted(_synsets(Path(val_list)).values())
        files = {p.stem: p for p in sorted((root / "val").rglob("*")) if is_photo(p)}
        index = {name: i for i, name in enumerate(wnids)}
        listed = _val_list(Path(val_list), wnids) if val_list is not None else [(k, None) for k in sorted(known)]
        require_files(root / "val", [files.get(stem, root / "val" / f"{stem}.JPEG") for stem, _ in listed])
        photos = []
        for stem, label in listed:
            wnid, found = known.get(stem, (None, ()))
            if label is None:
                if wnid not in index:
                    raise DataError(f"{boxes}: photo {stem} is of {wnid}, which is no folder of {root / 'train'}.")
                label = index[wnid]
            photos.append(LabelledPhoto(stem, files[stem], label, found))
        super().__init__(photos, wnids, **options)


def _val_list(path: Path, wnids: Sequence[str]) -> list[tuple[str, int]]:
    if any(";" in line for line in lines(path)):
        found = rows(path, 2, ";")
        return [(Path(name).stem, class_index(path, n, label, len(wnids))) for n, (name, label) in found]
    synsets, listed = _synsets(path), []
    for number, (own,) in rows(path, 1):
        wnid = synsets.get(convert(path, number, [own], int)[0])
        if wnid not in wnids:
            raise DataError(f"{path}, line {number}: class {own}, {wnid or 'which the devkit lacks'}, isn't known.")
        listed.append((f"ILSVRC2012_val_{number:08d}", wnids.index(wnid)))
    return listed


def _synsets(path: Path) -> dict[int, str]:
    """WordNet ids of the 1,000 classes by the devkit's numbers, from the files beside its ground truth."""
    table, matlab = path.parent / "map_clsloc.txt", path.parent / "meta.mat"
    if table.exists():
        return {convert(table, n, [own], int)[0]: wnid for n, (wnid, own, *_) in rows(table, range(2, 4))}
    if not matlab.exists():
        raise DataError(f"{path}: neither meta.mat nor map_clsloc.txt of the devkit is beside it.")
    try:
        synsets = loadmat(matlab, squeeze_me=True)["synsets"]
        # a class without children is a leaf; the others only group them
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not s["num_children"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError, MatReadError) as error:
        raise DataError(f"{matlab}: not the devkit's table of classes ({error}).") from error


class FlatFolder(LocalizationDataset):
    """ImageNet photos in one folder, the class in the file's name: ``root/<wnid>_<name>``, as n01440764_tench.JPEG.

    Classes are the WordNet ids in ascending order, so that all 1,000 have ImageNet's indices. A class is called what
    its first photo is, n01440764_tench, or by the id alone where a number follows, n01440764_18.JPEG.

    Args:
        root: see above.
        boxes: as for `ImageFolder`, or None.
        class_names: of another data set, so that indices agree; they begin with the WordNet id.
    """

    def __init__(
        self,
        root: str | Path,
        boxes: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        root = Path(root)
        paths = photos_in(root)
        if strangers := [path for path in paths if not WNID.match(path.name)]:
            raise DataError(
                f"{root}: {len(strangers)} of {len(paths)} photos don't begin with a WordNet id like n01440764_tench, "
                f"the first is {strangers[0].name}."
            )
        first = {class_key(path.stem): path.stem for path in reversed(paths)}
        names = [key if re.fullmatch(r"[\W_]*\d*", name[len(key) :]) else name for key, name in sorted(first.items())]
        names = names if class_names is None else list(class_names)
        index = {class_key(name): label for label, name in enumerate(names)}
        if unknown := sorted(first.keys() - index.keys()):
            raise DataError(f"{root}: {first[unknown[0]]} is of none of the {len(names)} classes.")
        photos = [LabelledPhoto(path.name, path, index[class_key(path.stem)]) for path in paths]
        super().__init__(photos if boxes is None else with_boxes(photos, Path(boxes)), names, **options)
