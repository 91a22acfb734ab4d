"""easy-VQA as a `datasets.DatasetDict` in TRL's conversational prompt-completion format with images.

The images and questions are those of the PyPI package `easy-vqa` (MIT). A tenth of the training images, with all
their questions, becomes the validation split, so that settings can be chosen without looking at the test split.

    python examples/easy_vqa/data.py --output_dir outputs/easy_vqa

writes one Parquet file per split, which `load_dataset("outputs/easy_vqa")` reads like any data set of the hub.
"""

import argparse
import random
from pathlib import Path

import easy_vqa
from datasets import Dataset, DatasetDict, Features, Image, List, Value


SHAPES = ("circle", "rectangle", "triangle")
VALIDATION_SHARE = 0.1
SPLIT_SEED = 0

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": MESSAGES,
        "completion": MESSAGES,
        "kind": Value("string"),
        "image_id": Value("int32"),
    }
)


def question_kind(question: str, answer: str) -> str:
    """Sort a question into one of four kinds, so that accuracy can be told apart where guessing is easy.

    `shape` and `color` ask for a word; `shape presence` and `color presence` are answered by yes or no.
    """
    if answer not in ("yes", "no"):
        return "shape" if answer in SHAPES else "color"
    return "shape presence" if any(shape in question for shape in SHAPES) else "color presence"


def _split(questions: tuple[list, list, list], image_paths: dict[int, str], image_ids: set[int]) -> Dataset:
    rows = [
        {
            "images": [image_paths[image_id]],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
            "kind": question_kind(question, answer),
            "image_id": image_id,
        }
        for question, answer, image_id in zip(*questions, strict=True)
        if image_id in image_ids
    ]
    return Dataset.from_list(rows, features=FEATURES)


def load_easy_vqa() -> DatasetDict:
    """The splits `train`, `validation` (images held out of easy-VQA's training images) and `test` (easy-VQA's own).

    Columns: `images` (a list with the one 64 x 64 image), `prompt` and `completion` (messages), `kind` (see
    [`question_kind`]) and `image_id` (unique within easy-VQA's train and test parts).
    """
    train_paths, test_paths = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    shuffled = random.Random(SPLIT_SEED).sample(sorted(train_paths), len(train_paths))
    held_out = set(shuffled[: int(VALIDATION_SHARE * len(shuffled))])
    train_questions = easy_vqa.get_train_questions()
    return DatasetDict(
        train=_split(train_questions, train_paths, set(train_paths) - held_out),
        validation=_split(train_questions, train_paths, held_out),
        test=_split(easy_vqa.get_test_questions(), test_paths, set(test_paths)),
    )


def write_parquet(splits: DatasetDict, folder: Path) -> None:
    """Write each split to `folder/<split>.parquet`, image bytes included."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/easy_vqa"), help="folder for the Parquet files"
    )
    args = parser.parse_args()
    splits = load_easy_vqa()
    write_parquet(splits, args.output_dir)
    print(
        f"easy-VQA in {args.output_dir}: " + ", ".join(f"{name} {split.num_rows:,}" for name, split in splits.items())
    )


if __name__ == "__main__":
    main()
