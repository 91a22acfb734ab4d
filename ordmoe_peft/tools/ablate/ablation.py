"""Ablations: cells of settings, each tuned on validation and compared with a baseline on test, over several seeds.

First every cell's settings are chosen on the validation split, then the chosen ones are trained anew and read the test
split, once. Each run leaves a file, so a killed ablation goes on where it stopped, and ablations that share a folder
share runs.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import OrdMoEConfigError
from ...files import write_whole
from ..measure.paired import mean_and_error, paired_difference


BASE = "base"
# Metric → (unit, what a sample's value is).
METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], list[float]]]] = {
    "accuracy": ("%", lambda evaluation: [100.0 * is_right for is_right in evaluation["is_right"]]),
    "log_likelihood": ("nats per token", lambda evaluation: evaluation["log_likelihood"]),
}


# -------------------------------------------------------------------------------------------------------------- cells
@dataclass(frozen=True)
class Cell:
    """A row of the table: a name and what it changes of the common settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run, or the base as it is.

    Args:
        phase (`str`): `"tune"` (evaluated on validation) or `"final"` (evaluated on test).
        changes (`dict`, *optional*): the cell's settings and the option tried; None is the base without training.
        seed (`int`, *optional*): the run's seed; the base has none.
    """

    phase: str
    changes: dict[str, Any] | None
    seed: int | None = None


def describe(settings: dict[str, Any]) -> str:
    """Settings as a name for people."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def make_cells(grid: dict[str, list] | None, cells: Iterable[dict[str, Any]] | None) -> list[Cell]:
    """The cells of a grid (a cartesian product) and of an explicit list; without either, the common settings.

    Raises:
        [`OrdMoEConfigError`]: an axis without values, or two cells of one name.
    """
    grid = {name: axis_values(name, values) for name, values in (grid or {}).items()}
    made = []
    if grid:
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        made += [Cell(describe(point), point) for point in points]
    for settings in cells or []:
        settings = dict(settings)
        made.append(Cell(str(settings.pop("name", None) or describe(settings)), settings))
    made = made or [Cell("OrdMoE")]
    check_unique([cell.name for cell in made])
    return made


def axis_values(name: str, values: Any) -> list:
    """The values that `name` takes, of which there must be some."""
    if not isinstance(values, list) or not values:
        raise OrdMoEConfigError(f"{name} needs a list of values to try, got {values!r}.")
    return values


def check_unique(names: Sequence[str]) -> None:
    """Raise [`OrdMoEConfigError`] where a name comes twice."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise OrdMoEConfigError(f"Two rows of the table are called {twice[0]!r}: give each cell a `name` of its own.")


# -------------------------------------------------------------------------------------------------------------- files
class RunFiles:
    """A file per finished run, in one folder, named after the run's complete settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, run: Run, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        kind = BASE if run.changes is None else f"c{key['adapter']['num_tiers']}_seed{run.seed}"
        return self.folder / f"{run.phase}_{kind}_{digest}.json"

    def read(self, run: Run, key: dict[str, Any]) -> dict[str, Any] | None:
        """The run's record, None if it has not finished."""
        path = self.path(run, key)
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, run: Run, key: dict[str, Any], record: dict[str, Any]) -> None:
        write_whole(self.path(run, key), json.dumps({"key": key, **record}, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------- ablation
class Ablation:
    """What is run, in which order, and what comes out.

    Args:
        baseline ([`Cell`]): what the cells are compared with.
        cells (`list[Cell]`): the cells.
        tune (`dict[str, list]`): options to choose from on validation, for each cell that they have an effect on.
        seeds (`list[int]`), tune_seeds (`list[int]`): seeds of the final runs and of those that choose.
        metric (`str`): what validation chooses by and the table shows: `"accuracy"` or `"log_likelihood"`.
        key (`Callable`): run → what tells it from others, as JSON.
        have_effect (`Callable`): changes, names → those names that change anything.
        execute (`Callable`): run → its record, with an `evaluation`.
        files ([`RunFiles`]): where records are kept.
    """

    def __init__(
        self,
        baseline: Cell,
        cells: list[Cell],
        tune: dict[str, list],
        seeds: list[int],
        tune_seeds: list[int],
        metric: str,
        key: Callable[[Run], dict[str, Any]],
        have_effect: Callable[[dict[str, Any], Iterable[str]], list[str]],
        execute: Callable[[Run], dict[str, Any]],
        files: RunFiles,
    ):
        if metric not in METRICS:
            raise OrdMoEConfigError(f"metric must be one of {tuple(METRICS)}, got {metric!r}.")
        for name, values in (("seeds", seeds), ("tune_seeds", tune_seeds)):
            if not values or len(set(values)) < len(values):
                raise OrdMoEConfigError(f"{name} must be one or more different numbers, got {values}.")
        self.baseline, self.cells, self.rows = baseline, cells, [baseline, *cells]
        check_unique([BASE, *(cell.name for cell in self.rows)])
        self.tune = {name: axis_values(f"tune: {name}", values) for name, values in tune.items()}
        self.seeds, self.tune_seeds, self.metric = seeds, tune_seeds, metric
        self.key, self.have_effect, self.execute, self.files = key, have_effect, execute, files

    def options(self, cell: Cell) -> list[dict[str, Any]]:
        """What can be chosen for `cell`: combinations of the tuned settings that it leaves open and that act on it."""
        names = [name for name in self.have_effect(cell.settings, self.tune) if name not in cell.settings]
        return [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(self.tune[name] for name in names))
        ]

    def tune_runs(self, cell: Cell, option: dict[str, Any]) -> list[Run]:
        return [Run("tune", {**cell.settings, **option}, seed) for seed in self.tune_seeds]

    def final_runs(self, cell: Cell, option: dict[str, Any]) -> list[Run]:
        return [Run("final", {**cell.settings, **option}, seed) for seed in self.seeds]

    def planned(self) -> list[tuple[str, Run, bool | None]]:
        """Name of the row, run, and whether it is done; None while what to run is not chosen yet."""
        planned = [(BASE, Run(phase, None)) for phase in ("tune", "final")]
        undecided = []
        for cell in self.rows:
            options = self.options(cell)
            tuning = [run for option in options for run in self.tune_runs(cell, option)] if len(options) > 1 else []
            planned += [(cell.name, run) for run in tuning]
            if all(self.is_done(run) for run in tuning):
                planned += [(cell.name, run) for run in self.final_runs(cell, self.choose(cell))]
            else:
                undecided += [(cell.name, Run("final", cell.settings, seed), None) for seed in self.seeds]
        return [(name, run, self.is_done(run)) for name, run in planned] + undecided

    def is_done(self, run: Run) -> bool:
        return self.files.path(run, self.key(run)).is_file()

    def record(self, run: Run) -> dict[str, Any]:
        """The run's record: read if it is there, else by running it."""
        key = self.key(run)
        record = self.files.read(run, key)
        if record is None:
            self.files.write(run, key, self.execute(run))
            record = self.files.read(run, key)
        split = self.key_split(run)
        assert record["evaluation"]["split"] == split, f"a {run.phase} run was evaluated on another split than {split}"
        return record

    def key_split(self, run: Run) -> str:
        return self.key(run)["evaluation"]["split"]

    def values(self, run: Run, metric: str | None = None) -> list[float]:
        """A value for each sample."""
        return METRICS[metric or self.metric][1](self.record(run)["evaluation"])

    def choose(self, cell: Cell) -> dict[str, Any]:
        """The option that is best on validation, on average over `tune_seeds`; of equals the likelier answers win."""
        options = self.options(cell)
        if len(options) == 1:
            return options[0]
        scores = [
            tuple(self.validation_score(cell, option, metric) for metric in (self.metric, "log_likelihood"))
            for option in options
        ]
        return options[max(range(len(options)), key=scores.__getitem__)]

    def validation_score(self, cell: Cell, option: dict[str, Any], metric: str) -> float:
        values = torch.tensor([self.values(run, metric) for run in self.tune_runs(cell, option)], dtype=torch.float64)
        mean = values.mean().item()
        return -math.inf if math.isnan(mean) else mean

    def run(self) -> dict[str, Any]:
        """Run what is missing and return the results. No run reads the test split before all choices are made."""
        base_on_validation = self.values(Run("tune", None))
        chosen = {cell.name: self.choose(cell) for cell in self.rows}
        base = Run("final", None)
        baseline_runs = self.final_runs(self.baseline, chosen[self.baseline.name])
        rows = [self._row(Cell(BASE), {}, [base], baseline_runs)]
        for cell in self.rows:
            runs = self.final_runs(cell, chosen[cell.name])
            rows.append(self._row(cell, chosen[cell.name], runs, None if cell is self.baseline else baseline_runs))
        base_score = sum(base_on_validation) / len(base_on_validation)
        return {
            "baseline": self.baseline.name,
            "metric": self.metric,
            "unit": METRICS[self.metric][0],
            "cells": rows,
            "notes": [*self._notes_on_statistics(), *self._notes_on_choices(chosen, base_score), *self.same_runs()],
        }

    def _row(
        self, cell: Cell, chosen: dict[str, Any], runs: list[Run], baseline_runs: list[Run] | None
    ) -> dict[str, Any]:
        records = [self.record(run) for run in runs]
        likelihood = self._measure(runs, baseline_runs, "log_likelihood")
        tiers = [record["evaluation"]["tier_log_likelihood"] for record in records]
        seconds = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
        return {
            "name": cell.name,
            "settings": cell.settings,
            "chosen": chosen,
            **self._measure(runs, baseline_runs, self.metric),
            "log_likelihood": {name: likelihood[name] for name in ("mean", "stderr", "difference")},
            "tier_log_likelihood": torch.tensor(tiers, dtype=torch.float64).mean(0).tolist(),
            "seconds_per_step": sum(seconds) / len(seconds) if seconds else None,
        }

    def _measure(self, runs: list[Run], baseline_runs: list[Run] | None, metric: str) -> dict[str, Any]:
        values_SN = torch.tensor([self.values(run, metric) for run in runs], dtype=torch.float64)
        per_seed = values_SN.mean(1).tolist()
        mean, stderr = mean_and_error(per_seed)
        difference = None
        if baseline_runs is not None:
            baseline_SN = torch.tensor([self.values(run, metric) for run in baseline_runs], dtype=torch.float64)
            difference = paired_difference(values_SN.expand(len(self.seeds), -1), baseline_SN).to_dict()
        return {"mean": mean, "stderr": stderr, "per_seed": per_seed, "difference": difference}

    # -------------------------------------------------------------------------------------------------------- notes
    def _notes_on_statistics(self) -> list[str]:
        if len(self.seeds) == 1:
            notes = ["One seed: the intervals cover the choice of items only, not what another seed would change."]
        else:
            notes = [
                f"Intervals are 95 %, from a bootstrap over {len(self.seeds)} seeds and all items, paired with the "
                "baseline by seed and item; their part for seeds is widened as Student's t is for so few."
            ]
        if len(self.cells) > 1:
            notes.append(
                f"{len(self.cells)} cells are compared with the baseline, each at 95 %: if none differed, "
                f"{0.05 * len(self.cells):.2g} would still be expected to show a gain or a loss. Trust one of many "
                "only if it holds on new seeds."
            )
        return notes

    def _notes_on_choices(self, chosen: dict[str, dict[str, Any]], base_score: float) -> list[str]:
        notes = []
        for cell in self.rows:
            if len(self.options(cell)) == 1:
                continue
            score = self.validation_score(cell, chosen[cell.name], self.metric)
            if score < base_score:
                notes.append(
                    f"{cell.name}: its best setting on validation ({self.metric} {score:.4g}) is below the base as it "
                    f"is ({base_score:.4g}): training did not help there, under any setting that was tried."
                )
        return notes

    def same_runs(self) -> list[str]:
        """What to say of cells that come to the same runs, as a reward sweep under `zscore` does."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.rows:
            candidates = [self.key(self.final_runs(cell, option)[0]) for option in self.options(cell)]
            groups.setdefault(json.dumps(candidates, sort_keys=True), []).append(cell)
        notes = []
        for cells in groups.values():
            if len(cells) == 1:
                continue
            note = f"{' and '.join(cell.name for cell in cells)} are the same training, so they share their runs."
            if len({json.dumps(cell.settings.get("rewards")) for cell in cells}) > 1:
                note += (
                    " Their rewards become the same advantages: zscore, which divides by their standard deviation, is "
                    "blind to the scale of rewards. A sweep of rewards means something only under advantages: center "
                    "or none."
                )
            notes.append(note)
        return notes
