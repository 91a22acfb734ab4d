"""The main job, end to end, on the shipped base: base, SFT (C = 1) and OrdMoE after equal steps, in one table.

    make demo            or            python examples/easy_vqa/demo.py

Every step is the `ordmoe` command that a user would type, in a process of its own, so that its peak memory is its
own. Adapters, answers and the table are left in `--output_dir`.
"""

import argparse
import sys
import time
from pathlib import Path

from data import load_easy_vqa, write_parquet


# A script sees its own folder alone; `examples.steps` is two above.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.steps import Story


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, default=100, help="training steps of 64 questions, for each adapter")
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions to evaluate on")
    args = parser.parse_args()

    started = time.perf_counter()
    write_parquet(load_easy_vqa(), args.output_dir / "data")
    story = Story(
        recipe="examples/recipes/easy_vqa.yaml",
        base="examples/easy_vqa/base",
        output=args.output_dir,
        steps=args.steps,
        questions=args.questions,
        kinds=("shape", "color", "shape presence", "color presence"),
        max_new_tokens=4,
    )
    story.compare("easy-VQA")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
