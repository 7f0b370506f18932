"""Encode photos once, then ask for masks with points and boxes, as with segment_anything's predictor.

python examples/prompt_a_batch.py examples/images/cat.jpg examples/images/coffee.jpg
"""

import sys

import numpy as np

from pro2sam_fast import SamPredictor, build_sam, read_image


def main(*paths: str) -> None:
    predictor = SamPredictor(build_sam("lite"))
    images = [read_image(path) for path in paths]
    predictor.set_images(images)
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        height, width = image.shape[:2]
        centre = np.array([[width / 2, height / 2]])
        masks, scores, _ = predictor.predict(centre, np.array([1]), image_index=index)
        best = int(scores.argmax())
        print(f"{path}: the mask at the centre covers {masks[best].mean():.0%}, predicted IoU {scores[best]:.2f}")
        box = np.array([width / 4, height / 4, 3 * width / 4, 3 * height / 4])
        masks, scores, _ = predictor.predict(box=box, multimask_output=False, image_index=index)
        print(f"{path}: the mask in the box covers {masks[0].mean():.0%}, predicted IoU {scores[0]:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
