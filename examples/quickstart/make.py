"""Draw the sample data of this folder from the PyPI package `easy-vqa`.

    python -m examples.quickstart.make

`train.jsonl` has 64 images of easy-VQA's training part, `test.jsonl` 16 of its test part, each with one question of
every kind (see `examples/easy_vqa/data.py`). A second run writes the same bytes.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import easy_vqa

from examples.easy_vqa.data import question_kind


KINDS = ("shape", "color", "shape presence", "color presence")
SEED = 0


def draw(part: str, questions: tuple[list, list, list], paths: dict[int, str], num_images: int, folder: Path) -> None:
    """Write `part`.jsonl with one question of each kind for so many images, and copy the images beside it."""
    generator = random.Random(SEED)
    of_image: dict[int, dict[str, list[tuple[str, str]]]] = {}
    for question, answer, image in zip(*questions, strict=True):
        kind = question_kind(question, answer)
        of_image.setdefault(image, {}).setdefault(kind, []).append((question, answer))
    complete = sorted(image for image, by_kind in of_image.items() if len(by_kind) == len(KINDS))
    rows = []
    for image in sorted(generator.sample(complete, num_images)):
        name = f"images/{part}-{image}.png"
        shutil.copyfile(paths[image], folder / name)
        rows += [row(name, *generator.choice(of_image[image][kind]), kind) for kind in KINDS]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (folder / f"{part}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def row(image: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    """A line of the file: TRL's messages format, and the image's path from the folder of the file."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"image": image, "messages": messages, "kind": kind}


def make(folder: Path) -> None:
    """Write both files and their images to `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), 64, folder)
    draw("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), 16, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="folder to write to")
    make(parser.parse_args().output_dir)
