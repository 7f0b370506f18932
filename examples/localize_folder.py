"""Find the object in every photo of a folder, in constant memory, and save the pictures.

python examples/localize_folder.py examples/images out
"""

import sys

import pro2sam_fast


def main(source: str, output: str) -> None:
    localizer = pro2sam_fast.load("lite")
    for photo in localizer(source, stream=True, on_error="skip"):
        if photo.error:
            print(f"skipped: {photo.error}")
            continue
        print(f"{photo.path}: {photo.label_name} {photo.label_score:.0%}, box {photo.box}, match {photo.score:.2f}")
        photo.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
