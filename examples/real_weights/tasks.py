"""The instruction sets of this example, of `reasoning-gym`: short answers and long ones.

    python -m examples.real_weights.tasks

writes a Parquet file per split: questions that the base half knows after a few labels, answered by a word, to
`outputs/real_weights/data`, and problems answered in Python, which the base has not seen, to
`outputs/real_weights/problems`.
"""

import argparse
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict

from examples.real_weights.text import PROBLEMS, as_row, problems
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


# Problems of these sizes, and the most characters of one with its solution.
PROBLEM_SIZES = {"train": 128, "validation": 32, "test": 80}
MOST_CHARACTERS = 1200


def load_problems(sizes: dict[str, int] | None = None) -> DatasetDict:
    """Problems that the base has not seen, and Python that solves them, in splits of `sizes` ([`PROBLEM_SIZES`])."""
    unseen = problems(PROBLEMS, None, MOST_CHARACTERS)
    return DatasetDict(
        {
            split: Dataset.from_list([as_row(problem) for problem in islice(unseen, number)])
            for split, number in (sizes or PROBLEM_SIZES).items()
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_weights"), help="where the folders go")
    args = parser.parse_args()
    for name, splits in {"data": load_tasks(), "problems": load_problems()}.items():
        write_parquet(splits, args.output_dir / name)
        sizes = ", ".join(f"{split} {len(rows):,}" for split, rows in splits.items())
        print(f"{args.output_dir / name}: {sizes}")


if __name__ == "__main__":
    main()
