"""docs/lite_photos.jpg: what the bundled `lite` model finds in every COCO val photo whose licence lets us show it.

    python benchmarks/sheet.py --data DATA

DATA/coco200 holds annotations/panoptic_val2017.json and images/val2017. No photo is left out: the failures are there
too. docs/lite_photos.md names each photo's source and licence and says whether the box reaches IoU 0.5 with the box
of some annotated thing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from rows import ROOT

import pro2sam_fast
from pro2sam_fast.eval.lite_accuracy import coco_things, things_hit

SHOWN = {
    4: "CC BY 2.0",
    5: "CC BY-SA 2.0",
    7: "no known copyright restrictions",
    8: "United States Government work",
}
TILE, GAP, COLUMNS = 220, 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    folder = arguments.data / "coco200"
    index = json.loads((folder / "annotations" / "panoptic_val2017.json").read_text())
    about = {image["id"]: image for image in index["images"]}
    about = [about[annotation["image_id"]] for annotation in index["annotations"]]  # the order of coco_things
    photos = [
        (facts, photo) for facts, photo in zip(about, coco_things(folder), strict=True) if facts["license"] in SHOWN
    ]
    results = pro2sam_fast.load("lite")([photo.image for _, (photo, _) in photos])

    lines = -(-len(photos) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, lines * (TILE + GAP) + GAP), (24, 24, 24))
    records = ["| photo | terms | box hits a thing | score |", "|---|---|---|---|"]
    for k, ((facts, photo), result) in enumerate(zip(photos, results, strict=True)):
        tile = result.plot(photo[0].image)
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        row, column = divmod(k, COLUMNS)
        sheet.paste(
            tile,
            (
                GAP + column * (TILE + GAP) + (TILE - tile.width) // 2,
                GAP + row * (TILE + GAP) + (TILE - tile.height) // 2,
            ),
        )
        hit = "no thing annotated" if not photo[1] else "yes" if things_hit([result], [photo]) else "no"
        photo_and_terms = f"[{facts['file_name']}]({facts['flickr_url']}) | {SHOWN[facts['license']]}"
        records.append(f"| {photo_and_terms} | {hit} | {result.score:.2f} |")
    sheet.save(arguments.docs / "lite_photos.jpg", quality=85)
    text = f"""# `lite` on photos it never saw

All {len(photos)} of the 51 COCO val photos of the accuracy rows whose licence allows showing them, left to right, top
to bottom; made by `python benchmarks/sheet.py --data DATA`. Each tile is a reduced photo with the found box, mask and
label drawn in, under the photo's own terms.

![{len(photos)} photos with found boxes and masks](lite_photos.jpg)

"""
    (arguments.docs / "lite_photos.md").write_text(text + "\n".join(records) + "\n")


if __name__ == "__main__":
    main()
