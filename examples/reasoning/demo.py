"""The text-only story, by the commands of the easy-VQA demo: data, base, SFT (C = 1) and OrdMoE, in one table.

    python -m examples.reasoning.demo

A base that an earlier run left in `--output_dir` is used again.
"""

import argparse
import time
from pathlib import Path

from examples.reasoning.data import TASKS, load_reasoning, write_parquet
from examples.reasoning.make_base import MAX_ANSWER, MOST_STEPS, make_base
from examples.steps import Story


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reasoning"))
    parser.add_argument("--steps", type=int, default=100, help="training steps of 64 questions, for each adapter")
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions to evaluate on")
    args = parser.parse_args()

    started = time.perf_counter()
    splits = load_reasoning()
    write_parquet(splits, args.output_dir / "data")
    base = args.output_dir / "base"
    if not (base / "model.safetensors").exists():
        print(make_base(splits, base, MOST_STEPS))
    story = Story(
        recipe="examples/recipes/reasoning.yaml",
        base=base,
        output=args.output_dir,
        steps=args.steps,
        questions=args.questions,
        kinds=tuple(TASKS),
        max_new_tokens=MAX_ANSWER,
    )
    story.compare("reasoning-gym")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
