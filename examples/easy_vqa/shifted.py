"""easy-VQA in domains that the shipped base never saw, to learn from few labels.

    python examples/easy_vqa/shifted.py --domain negative --output_dir outputs/easy_vqa_negative

`negative`: the photographic negatives of the images, with the same questions and answers: red is seen as cyan, white
ground as black. `describe`: the images as they are, with one question of a kind that the base was never asked, answered
in three words ("a red circle"). Splits, columns and files are those of `data.py`.
"""

import argparse
from pathlib import Path

from datasets import Dataset, DatasetDict
from PIL import ImageOps

from data import FEATURES, SHAPES, load_easy_vqa, write_parquet


QUESTION = "describe the image"


def negative(split: Dataset) -> Dataset:
    """The same questions about the images' negatives."""

    def invert(row: dict) -> dict:
        return {"images": [ImageOps.invert(image.convert("RGB")) for image in row["images"]]}

    return split.map(invert, features=FEATURES)


def describe(split: Dataset) -> Dataset:
    """One row an image: what color and shape it has, as the original questions about it tell."""
    known: dict[int, dict[str, str]] = {}
    rows: dict[int, int] = {}
    for index, row in enumerate(split.remove_columns("images")):
        if row["kind"] in ("shape", "color"):
            known.setdefault(row["image_id"], {})[row["kind"]] = row["completion"][0]["content"]
        rows.setdefault(row["image_id"], index)
    answers = {image: f"a {found['color']} {found['shape']}" for image, found in known.items() if len(found) == 2}

    def ask(row: dict) -> dict:
        answer = answers[row["image_id"]]
        return {
            "prompt": [{"role": "user", "content": QUESTION}],
            "completion": [{"role": "assistant", "content": answer}],
            "kind": next(shape for shape in SHAPES if answer.endswith(shape)),
        }

    return split.select([rows[image] for image in sorted(answers)]).map(ask, features=FEATURES)


DOMAINS = {"negative": negative, "describe": describe}


def load_shifted(domain: str) -> DatasetDict:
    """The three splits of easy-VQA in one of [`DOMAINS`]."""
    return DatasetDict({name: DOMAINS[domain](split) for name, split in load_easy_vqa().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="negative")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the Parquet files")
    args = parser.parse_args()
    splits = load_shifted(args.domain)
    write_parquet(splits, args.output_dir)
    print(
        f"{args.domain} in {args.output_dir}: "
        + ", ".join(f"{name} {split.num_rows:,}" for name, split in splits.items())
    )


if __name__ == "__main__":
    main()
