"""All masks of several photos in one call: galleries, their scores, and a picture with every mask in its own colour.

python examples/segment_everything.py out examples/images/cat.jpg examples/images/coffee.jpg
"""

import sys
from pathlib import Path

from pro2sam_fast import MaskGenerator, build_sam, read_image
from pro2sam_fast.draw import draw_gallery
from pro2sam_fast.writers import gallery_patches


def main(output: str, *paths: str, **options) -> None:
    Path(output).mkdir(parents=True, exist_ok=True)
    images = [read_image(path) for path in paths]
    generator = MaskGenerator(build_sam("lite"), **{"pred_iou_thresh": 0.7, "stability_score_thresh": 0.9, **options})
    for path, image, gallery in zip(paths, images, generator.generate(images), strict=True):
        print(f"{path}: {gallery}")
        for record in gallery.to_records("coco_rle")[:3]:  # the same records as segment_anything's
            print(f"  area {record['area']}, box {record['bbox']}, predicted IoU {record['predicted_iou']:.2f}")
        draw_gallery(image, gallery_patches(gallery)).save(Path(output) / f"{Path(path).stem}-masks.jpg")


if __name__ == "__main__":
    main(*sys.argv[1:])
