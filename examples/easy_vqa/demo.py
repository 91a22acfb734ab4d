"""The main job, end to end, on the shipped base: base, SFT (C = 1) and OrdMoE after equal steps, in one table.

    make demo            or            python examples/easy_vqa/demo.py

Every step is the `ordmoe` command that a user would type, in a process of its own, so that its peak memory is its
own. Adapters, answers and the table are left in `--output`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from ordmoe_peft.cli.tables import percent, print_table

from data import load_easy_vqa, write_parquet


RECIPE = "examples/recipes/easy_vqa.yaml"
BASE = "examples/easy_vqa/base"
KINDS = ("shape", "color", "shape presence", "color presence", "overall")
TIERS = (1, 2, 3)


def ordmoe(*arguments: object) -> None:
    """Run an `ordmoe` command, printing what it prints."""
    command = [sys.executable, "-m", "ordmoe_peft.cli.main", *map(str, arguments)]
    print("\n$ ordmoe", *command[3:], flush=True)
    subprocess.run(command, check=True)


def train(name: str, num_tiers: int, output: Path, steps: int) -> dict:
    """Train an adapter and return its training metrics."""
    folder = output / name
    data = ["--dataset_name", output / "data"]
    ordmoe("train", "--config", RECIPE, *data, "--num_tiers", num_tiers, "--max_steps", steps, "--output_dir", folder)
    return json.loads((folder / "train_results.json").read_text())


def evaluate(name: str, adapter: Path | None, output: Path, questions: int) -> list[dict]:
    """Evaluate all tiers on held-out questions and return a result per tier."""
    results = output / f"{name}_results.json"
    options = ["--adapter", adapter] if adapter else []
    options += ["--dataset_name", output / "data", "--limit", questions, "--tiers", *TIERS, "--num_tiers", len(TIERS)]
    options += ["--group_by", "kind", "--batch_size", 128, "--max_new_tokens", 4, "--output", results]
    ordmoe("evaluate", "--model_name_or_path", BASE, "--load_in_4bit", "true", *options)
    return json.loads(results.read_text())


def table_row(name: str, results: list[dict], metrics: dict | None) -> list[str]:
    top = results[0]
    row = [name, *(percent(top["accuracy"].get(kind, float("nan"))) for kind in KINDS)]
    row += [f"{result['log_likelihood']:.2f}" for result in results]
    if metrics is None:
        return [*row, "", ""]
    return [*row, f"{metrics['train_seconds_per_step']:.2f}", f"{metrics['peak_memory_bytes'] / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, default=100, help="training steps of 64 questions, for each adapter")
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions to evaluate on")
    args = parser.parse_args()

    started = time.perf_counter()
    write_parquet(load_easy_vqa(), args.output / "data")
    metrics = {
        "SFT (C = 1)": train("sft", 1, args.output, args.steps),
        "OrdMoE (C = 3)": train("ordmoe", 3, args.output, args.steps),
    }
    adapters = {"base": None, "SFT (C = 1)": args.output / "sft", "OrdMoE (C = 3)": args.output / "ordmoe"}
    rows = []
    for name, adapter in adapters.items():
        results = evaluate(adapter.name if adapter else "base", adapter, args.output, args.questions)
        rows.append(table_row(name, results, metrics.get(name)))
    columns = ["", *KINDS, *(f"L̄ tier {tier}" for tier in TIERS), "s/step", "peak GB"]
    print_table(
        f"\neasy-VQA, {args.questions} held-out test questions, {args.steps} steps of 64: exact match by question kind "
        "(tier 1), mean log-likelihood per answer token by tier, cost of training",
        columns,
        rows,
    )
    print(f"Adapter: {args.output / 'ordmoe'}  ({(time.perf_counter() - started) / 60:.1f} minutes)")


if __name__ == "__main__":
    main()
