"""Questions of `reasoning-gym` as a `datasets.DatasetDict` in TRL's conversational prompt-completion format.

The PyPI package `reasoning-gym` (Apache-2.0) draws questions with verifiable answers from a seed. Three of its tasks
have answers of a few characters and are of different difficulty for a model of two million weights: in minutes it
learns to spell words backward, partly to find greatest common divisors, and hardly to add and subtract two numbers.

    python -m examples.reasoning.data --output_dir outputs/reasoning/data

writes one Parquet file per split, which `load_dataset("outputs/reasoning/data")` reads like any data set of the hub.
"""

import argparse
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, List, Value
from reasoning_gym import create_dataset


# Kinds of question: tasks of reasoning-gym, under its names, with its settings.
TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 10},
    "gcd": {"max_value": 200},
}
SIZES = {"train": 6000, "validation": 500, "test": 500}
# reasoning-gym draws question i of seed s by seed s + i, so seeds that are closer than a split is long overlap.
FIRST_SEEDS = {"train": 0, "validation": 10_000_000, "test": 20_000_000}

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features({"prompt": MESSAGES, "completion": MESSAGES, "kind": Value("string"), "seed": Value("int64")})


def question_key(kind: str, question: str) -> tuple[str, ...]:
    """What makes a question the same as another: its words in any order, so that 8 + 5 and 5 + 8 are one."""
    return (kind, *sorted(re.findall(r"\w+|[-+]", question)))


def draw_questions(
    kind: str, settings: dict, first_seed: int, number: int, seen: set[tuple[str, ...]]
) -> Iterator[dict]:
    """Yield `number` rows of one kind from `first_seed` on, none of them in `seen`, and add them to it.

    `create_dataset(kind, seed=row["seed"], size=1, **settings)[0]` is the entry of a row, as its `score_answer` wants
    it.
    """
    task = create_dataset(kind, seed=first_seed, size=1, **settings)
    for index in count():
        if number == 0:
            return
        entry = task[index]
        key = question_key(kind, entry["question"])
        if key in seen:
            continue
        seen.add(key)
        number -= 1
        yield {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "completion": [{"role": "assistant", "content": entry["answer"]}],
            "kind": kind,
            "seed": first_seed + index,
        }


def load_reasoning(sizes: dict[str, int] | None = None, tasks: dict[str, dict] | None = None) -> DatasetDict:
    """The splits `train`, `validation` and `test`, drawn from seeds far apart; no question is in two of them.

    Columns: `prompt` and `completion` (messages), `kind` (the name of the task) and `seed` (of the question).

    Args:
        sizes (`dict[str, int]`, defaults to [`SIZES`]): questions of each kind, per split.
        tasks (`dict[str, dict]`, defaults to [`TASKS`]): kind → its settings in reasoning-gym.
    """
    seen = set()
    splits = DatasetDict()
    for split, number in (sizes or SIZES).items():
        rows = [
            row
            for kind, settings in (tasks or TASKS).items()
            for row in draw_questions(kind, settings, FIRST_SEEDS[split], number, seen)
        ]
        splits[split] = Dataset.from_list(rows, features=FEATURES)
    return splits


def write_parquet(splits: DatasetDict, folder: Path) -> None:
    """Write each split to `folder/<split>.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reasoning/data"), help="folder for the files")
    args = parser.parse_args()
    splits = load_reasoning()
    write_parquet(splits, args.output_dir)
    print(
        f"reasoning-gym in {args.output_dir}: " + ", ".join(f"{name} {len(split):,}" for name, split in splits.items())
    )


if __name__ == "__main__":
    main()
