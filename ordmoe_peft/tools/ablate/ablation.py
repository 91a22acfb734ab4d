"""Ablations: cells of settings, each tuned on validation and compared with a baseline on test, over several seeds.

First every cell's settings are chosen on the validation split, then the chosen ones are trained anew and read the test
split, once.
"""

import json
import math
from collections import Counter
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...errors import OrdMoEConfigError
from ...moe_model import MoEModel
from ...monitoring.diagnostics import ablation_findings
from ...tiers.plan import make_plan
from ...tiers.routing import settings_of
from ..measure.paired import mean_and_error, paired_difference
from . import grid
from .grid import BASE, METRICS, AblateArguments, Cell, Run
from .runner import AblationRunner


class Ablation:
    """What is run, in which order, and what comes out.

    Args:
        arguments ([`AblateArguments`]): what is compared.
        runner ([`AblationRunner`]): executes the runs.

    Raises:
        [`OrdMoEConfigError`]: a name that cannot be varied, or a value that cannot work.
    """

    def __init__(self, arguments: AblateArguments, runner: AblationRunner):
        self.runner, self.settings, self.metric = runner, runner.settings, arguments.metric
        self.seeds, self.tune_seeds = arguments.seeds, arguments.tune_seeds or arguments.seeds
        tune: Any = arguments.tune  # all four are no longer text once the arguments are made
        axes: Any = arguments.grid
        cells: Any = arguments.cells
        baseline: Any = arguments.baseline
        self.settings.check_names(tune, "tune")
        self.settings.check_names(axes, "grid")
        self.baseline = self._read(grid.make_cell(baseline, grid.baseline_name), "baseline")
        self.cells = [self._read(cell, f"The cell {cell.name!r}") for cell in grid.make_cells(axes, cells)]
        self.rows = [self.baseline, *self.cells]
        twice = {name for name, count in Counter([BASE, *(cell.name for cell in self.rows)]).items() if count > 1}
        if twice:
            raise OrdMoEConfigError(
                f"Two rows of the table are called {min(twice)!r}: give each cell a `name` of its own."
            )
        self.tune = {}
        for name, values in tune.items():
            grid.check_axis(f"tune: {name}", values)
            self.tune[name] = [self.settings.typed(name, value) for value in values]
        for changes in self.candidates():
            self.settings.build(changes)

    def _read(self, cell: Cell, where: str) -> Cell:
        """The cell with its settings in their types, once their names are known to be right."""
        self.settings.check_names(cell.settings, where)
        return Cell(cell.name, {name: self.settings.typed(name, value) for name, value in cell.settings.items()})

    def options(self, cell: Cell) -> list[dict[str, Any]]:
        """What can be chosen for `cell`: combinations of the tuned settings that it leaves open and that act on it."""
        names = [name for name in self.settings.have_effect(cell.settings, self.tune) if name not in cell.settings]
        return grid.combinations({name: self.tune[name] for name in names})

    def candidates(self) -> list[dict[str, Any]]:
        """What every row changes, for each of its options."""
        return [{**cell.settings, **option} for cell in self.rows for option in self.options(cell)]

    def runs(self, phase: str, cell: Cell, option: dict[str, Any]) -> list[Run]:
        """The runs of a cell with an option, in a phase: one per seed."""
        seeds = self.tune_seeds if phase == "tune" else self.seeds
        return [Run(phase, {**cell.settings, **option}, seed) for seed in seeds]

    def check_tiers(self, model: nn.Module) -> None:
        """See that every cell's tiers fit the model, before anything runs."""
        layers = MoEModel.of(model).layers
        for changes in self.candidates():
            config, _ = self.settings.build(changes)
            make_plan(layers, 1, settings_of(config))

    def planned(self) -> list[tuple[str, Run, bool | None]]:
        """Name of the row, run, and whether it is done; None while what to run is not chosen yet."""
        planned = [(BASE, Run(phase, None)) for phase in ("tune", "final")]
        undecided: list[tuple[str, Run, bool | None]] = []
        for cell in self.rows:
            options = self.options(cell)
            tuning = [run for option in options for run in self.runs("tune", cell, option)] if len(options) > 1 else []
            planned += [(cell.name, run) for run in tuning]
            if all(map(self.runner.is_done, tuning)):
                planned += [(cell.name, run) for run in self.runs("final", cell, self.choose(cell))]
            else:
                undecided += [(cell.name, run, None) for run in self.runs("final", cell, {})]
        return [*((name, run, self.runner.is_done(run)) for name, run in planned), *undecided]

    def remaining(self) -> int:
        """How many runs remain; equal ones count once."""
        planned = self.planned()
        undecided = sum(done is None for _, _, done in planned)
        return undecided + len({self.runner.path(run) for _, run, done in planned if done is False})

    # -------------------------------------------------------------------------------------------------------- running
    def run(self) -> dict[str, Any]:
        """Run what is missing and return the results. No run reads the test split before all choices are made."""
        with tqdm(total=self.remaining(), desc="Ablation", unit="run") as self.runner.bar:
            base_score = self.values([Run("tune", None)], self.metric).mean().item()
            chosen = {cell.name: self.choose(cell) for cell in self.rows}
            baseline_runs = self.runs("final", self.baseline, chosen[self.baseline.name])
            rows = [self._row(Cell(BASE), {}, [Run("final", None)], baseline_runs)]
            for cell in self.rows:
                runs = self.runs("final", cell, chosen[cell.name])
                rows.append(self._row(cell, chosen[cell.name], runs, None if cell is self.baseline else baseline_runs))
        notes = [*self._notes_on_statistics(), *self._notes_on_choices(chosen, base_score), *self.same_runs()]
        unit = METRICS[self.metric][0]
        results = {"baseline": self.baseline.name, "metric": self.metric, "unit": unit, "cells": rows, "notes": notes}
        notes += [finding.message for finding in ablation_findings(results)]
        return results

    def choose(self, cell: Cell) -> dict[str, Any]:
        """The option that is best on validation, on average over `tune_seeds`; of equals the likelier answers win."""
        options = self.options(cell)
        if len(options) == 1:
            return options[0]
        metrics = (self.metric, "log_likelihood")
        return max(options, key=lambda option: [self.validation_score(cell, option, metric) for metric in metrics])

    def validation_score(self, cell: Cell, option: dict[str, Any], metric: str) -> float:
        mean = self.values(self.runs("tune", cell, option), metric).mean().item()
        return -math.inf if math.isnan(mean) else mean

    def values(self, runs: list[Run], metric: str) -> torch.Tensor:
        """A value for each run and sample (`torch.Tensor` of shape `(S, N)`)."""
        of_evaluation = METRICS[metric][1]
        values = [of_evaluation(self.runner.record(run)["evaluation"]) for run in runs]
        return torch.tensor(values, dtype=torch.float64)

    def _row(
        self, cell: Cell, chosen: dict[str, Any], runs: list[Run], baseline_runs: list[Run] | None
    ) -> dict[str, Any]:
        records = [self.runner.record(run) for run in runs]
        by_metric = {metric: self._measure(runs, baseline_runs, metric) for metric in METRICS}
        tiers = [record["evaluation"]["tier_log_likelihood"] for record in records]
        seconds = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
        return {
            "name": cell.name,
            "settings": cell.settings,
            "chosen": chosen,
            **by_metric[self.metric],
            **by_metric,
            "tier_log_likelihood": torch.tensor(tiers, dtype=torch.float64).mean(0).tolist(),
            "seconds_per_step": sum(seconds) / len(seconds) if seconds else None,
        }

    def _measure(self, runs: list[Run], baseline_runs: list[Run] | None, metric: str) -> dict[str, Any]:
        values_SN = self.values(runs, metric)
        per_seed = values_SN.mean(1).tolist()
        mean, stderr = mean_and_error(per_seed)
        difference = None
        if baseline_runs is not None:
            baseline_SN = self.values(baseline_runs, metric)
            difference = paired_difference(values_SN.expand(len(self.seeds), -1), baseline_SN).to_dict()
        return {"mean": mean, "stderr": stderr, "per_seed": per_seed, "difference": difference}

    # ---------------------------------------------------------------------------------------------------------- notes
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
        tuned = [cell for cell in self.rows if len(self.options(cell)) > 1]
        scores = {cell.name: self.validation_score(cell, chosen[cell.name], self.metric) for cell in tuned}
        return [
            f"{name}: its best setting on validation ({self.metric} {score:.4g}) is below the base as it is "
            f"({base_score:.4g}): training did not help there, under any setting that was tried."
            for name, score in scores.items()
            if score < base_score
        ]

    def same_runs(self) -> list[str]:
        """What to say of cells that come to the same runs, as a reward sweep under `zscore` does."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.rows:
            keys = [self.runner.key(self.runs("final", cell, option)[0]) for option in self.options(cell)]
            groups.setdefault(json.dumps(keys, sort_keys=True), []).append(cell)
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
