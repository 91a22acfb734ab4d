"""An ablation's plan and results as rows of text, for the terminal and for Markdown."""

from typing import Any

from .ablation import Ablation
from .grid import describe, other_metric


PLAN_COLUMNS = ("", "phase", "settings", "seed", "state")
STATES = {True: "done", False: "to run", None: "after choosing"}
# Of a row: what the metric says, and what the other one does.
METRIC_COLUMNS, OTHER_COLUMNS = (0, 1, 2, 3, 4, 8), (0, 5, 6, 7)
DIGITS = {"accuracy": 2, "log_likelihood": 3}


def plan_rows(ablation: Ablation) -> list[list[str]]:
    """A row per run."""
    return [
        [
            name,
            run.phase,
            describe(run.changes or {}) + (", …" if done is None else ""),
            "" if run.seed is None else str(run.seed),
            STATES[done],
        ]
        for name, run, done in ablation.planned()
    ]


def columns(results: dict[str, Any]) -> tuple[str, ...]:
    """The headings of [`result_rows`]."""
    metric = ("", "chosen", "mean ± s.e.", "difference [95 %]", "verdict")
    return *metric, other_metric(results["metric"]).replace("_", "-"), "difference [95 %]", "verdict", "s/step"


def result_rows(results: dict[str, Any]) -> list[list[str]]:
    """A row per cell of the results, under [`columns`]."""
    metric, other = results["metric"], other_metric(results["metric"])
    return [
        [
            cell["name"],
            describe(cell["chosen"]),
            *_measured(cell, DIGITS[metric]),
            *_measured(cell[other], DIGITS[other]),
            "" if cell["seconds_per_step"] is None else f"{cell['seconds_per_step']:.2f}",
        ]
        for cell in results["cells"]
    ]


def _measured(measured: dict[str, Any], digits: int) -> tuple[str, str, str]:
    """A mean with its error, the difference with its interval, and the verdict on it."""
    mean, stderr, difference = (measured[name] for name in ("mean", "stderr", "difference"))
    text = f"{mean:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
    if difference is None:
        return text, "", ""
    change, low, high = (f"{difference[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return text, f"{change} [{low}, {high}]", difference["verdict"]
