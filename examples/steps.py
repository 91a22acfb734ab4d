"""What the demos share: `ordmoe` commands in processes of their own, and the table of what they found."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ordmoe_peft.cli.tables import percent, print_table


TIERS = (1, 2, 3)
SFT, ORDMOE = "SFT (C = 1)", f"OrdMoE (C = {len(TIERS)})"


def ordmoe(*arguments: object) -> None:
    """Run an `ordmoe` command, printing what it prints."""
    command = [sys.executable, "-m", "ordmoe", *map(str, arguments)]
    print("\n$ ordmoe", *command[3:], flush=True)
    subprocess.run(command, check=True)


@dataclass
class Story:
    """A base, its data and a recipe: what a demo trains and evaluates, with 4-bit experts.

    Args:
        recipe (`str`): YAML file for `ordmoe train`.
        base (`str` or `Path`): folder of the base model.
        output (`Path`): folder for adapters and results; the data are in its folder `data`.
        steps (`int`): training steps of each adapter.
        questions (`int`): held-out questions to evaluate on.
        kinds (sequence of `str`): values of the column `kind`, in the table's order.
        max_new_tokens (`int`): longest answer.
    """

    recipe: str
    base: str | Path
    output: Path
    steps: int
    questions: int
    kinds: Sequence[str]
    max_new_tokens: int

    def train(self, name: str, num_tiers: int) -> dict:
        """Train the adapter `name` and return its training metrics."""
        folder = self.output / name
        options = ["--dataset_name", self.output / "data"]
        options += ["--num_tiers", num_tiers, "--max_steps", self.steps, "--output_dir", folder]
        options += ["--overwrite_output_dir", "true"]
        ordmoe("train", self.base, "--config", self.recipe, *options)
        return json.loads((folder / "train_results.json").read_text())

    def evaluate(self, name: str, adapter: Path | None = None) -> list[dict]:
        """Evaluate all tiers on held-out questions and return a result per tier."""
        results = self.output / f"{name}_results.json"
        options = ["--adapter", adapter] if adapter else []
        options += ["--dataset_name", self.output / "data", "--limit", self.questions]
        options += ["--tiers", *TIERS, "--num_tiers", len(TIERS), "--group_by", "kind"]
        options += ["--per_device_eval_batch_size", 128, "--max_new_tokens", self.max_new_tokens]
        options += ["--output_file", results]
        ordmoe("evaluate", self.base, "--load_in_4bit", *options)
        return json.loads(results.read_text())

    def compare(self, title: str) -> None:
        """Train by SFT and by OrdMoE, evaluate both and the base, and print one table."""
        metrics = {SFT: self.train("sft", 1), ORDMOE: self.train("ordmoe", len(TIERS))}
        rows = [self._row("base", self.evaluate("base"), None)]
        for label, name in ((SFT, "sft"), (ORDMOE, "ordmoe")):
            rows.append(self._row(label, self.evaluate(name, self.output / name), metrics[label]))
        columns = ["", *self.kinds, "overall", *(f"L̄ tier {tier}" for tier in TIERS), "s/step", "peak GB"]
        print_table(
            f"\n{title}, {self.questions} held-out test questions, {self.steps} steps of 64: exact match by question "
            "kind (tier 1), mean log-likelihood per answer token by tier, cost of training",
            columns,
            rows,
        )
        print(f"Adapter: {self.output / 'ordmoe'}")

    def _row(self, label: str, results: list[dict], metrics: dict | None) -> list[str]:
        accuracy = results[0]["accuracy"]
        row = [label, *(percent(accuracy.get(kind, float("nan"))) for kind in (*self.kinds, "overall"))]
        row += [f"{result['log_likelihood']:.2f}" for result in results]
        if metrics is None:
            return [*row, "", ""]
        return [*row, f"{metrics['train_seconds_per_step']:.2f}", f"{metrics['peak_memory_bytes'] / 1e9:.2f}"]
