"""The instruction set of this example: questions of `reasoning-gym` that the base half knows after a few labels.

    python -m examples.real_weights.tasks --output_dir outputs/real_weights/data

writes a Parquet file per split, with the columns of `examples/reasoning/data.py`.
"""

import argparse
from pathlib import Path

from datasets import DatasetDict

from examples.reasoning.data import load_reasoning, write_parquet


# Task → its settings in reasoning-gym: short questions in words, answered by a word. Of the last two the base saw other
# questions when it was repaired (`text.py`).
TASKS = {
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 3},
    "family_relationships": {},
    "syllogism": {},
}
# Shorter than the one that the chat template puts in otherwise.
SYSTEM = "Answer in a few words."
SIZES = {"train": 400, "validation": 100, "test": 200}


def load_tasks(sizes: dict[str, int] | None = None) -> DatasetDict:
    """The splits of [`~examples.reasoning.data.load_reasoning`], of these tasks and with a system message.

    Args:
        sizes (`dict[str, int]`, defaults to [`SIZES`]): questions of each task, per split.
    """
    system = {"role": "system", "content": SYSTEM}
    return load_reasoning(sizes or SIZES, TASKS).map(lambda row: {"prompt": [system, *row["prompt"]]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/real_weights/data"), help="folder for the files"
    )
    args = parser.parse_args()
    splits = load_tasks()
    write_parquet(splits, args.output_dir)
    print(f"{args.output_dir}: " + ", ".join(f"{name} {len(split):,}" for name, split in splits.items()))


if __name__ == "__main__":
    main()
