"""What an ablation compares: its arguments, the cells that they name, and the runs that cells come to."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...data.samples import check_counts
from ...errors import OrdMoEConfigError


BASE = "base"
# Metric → (unit, what a sample's value is).
METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], list[float]]]] = {
    "accuracy": ("%", lambda evaluation: [100.0 * is_right for is_right in evaluation["is_right"]]),
    "log_likelihood": ("nats per token", lambda evaluation: evaluation["log_likelihood"]),
}


def other_metric(metric: str) -> str:
    """The one that validation does not choose by."""
    return "accuracy" if metric == "log_likelihood" else "log_likelihood"


@dataclass
class AblateArguments:
    """What to compare, and on what. All other options are the settings common to all cells."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or hub id of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_validation_split: str = field(default="validation", metadata={"help": "Split that settings are chosen on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split that is read once, for the chosen settings."}
    )
    train_limit: int | None = field(
        default=None,
        metadata={"help": "Train on this many samples, drawn by each run's seed, or by data_seed where it is set."},
    )
    validation_limit: int | None = field(default=None, metadata={"help": "Samples of the split to use, by seed 0."})
    test_limit: int | None = field(default=None, metadata={"help": "Samples of the split to use, drawn by seed 0."})
    group_by: str | None = field(default=None, metadata={"help": "Column whose values get an accuracy of their own."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to generate, greedily."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of the final runs."})
    tune_seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of the runs that choose on validation; the seeds by default."}
    )
    tune: dict | str | None = field(
        default=None, metadata={"help": "Option → values to choose from on validation, for each cell. A mapping."}
    )
    metric: str = field(default="accuracy", metadata={"help": "What validation chooses by.", "choices": list(METRICS)})
    baseline: dict | str | None = field(
        default_factory=lambda: {"num_tiers": 1}, metadata={"help": "What the cells are compared with. A mapping."}
    )
    grid: dict | str | None = field(
        default=None, metadata={"help": "Option → values; every combination is a cell. A mapping."}
    )
    cells: list | str | None = field(
        default=None, metadata={"help": "Cells: a list of mappings of options to values, and `name`."}
    )
    results_name: str = field(
        default="results", metadata={"help": "Name of the results' files in output_dir, without ending."}
    )
    report: str | None = field(default=None, metadata={"help": "Folder for an HTML report."})
    dry_run: bool = field(default=False, metadata={"help": "List the runs, and which are done, and stop."})

    def __post_init__(self):
        for name, kind in (("tune", dict), ("baseline", dict), ("grid", dict), ("cells", list)):
            setattr(self, name, _from_json(name, getattr(self, name), kind) or kind())
        if not all(isinstance(cell, dict) for cell in self.cells or ()):
            raise OrdMoEConfigError(f"cells must be mappings of options to values, got {self.cells}.")
        splits = (self.dataset_train_split, self.dataset_validation_split, self.dataset_test_split)
        if len(set(splits)) < 3:
            raise OrdMoEConfigError(f"Training, validation and test need a split each, got {splits}.")
        for name in ("train_limit", "validation_limit", "test_limit", "max_new_tokens"):
            check_counts(**{name: getattr(self, name)})
        if self.metric not in METRICS:
            raise OrdMoEConfigError(f"metric must be one of {tuple(METRICS)}, got {self.metric!r}.")
        for name, values in (("seeds", self.seeds), ("tune_seeds", self.tune_seeds or self.seeds)):
            if not values or len(set(values)) < len(values):
                raise OrdMoEConfigError(f"{name} must be one or more different numbers, got {values}.")

    def training_data(self) -> dict[str, Any]:
        """The options that say what is trained on."""
        names = ("dataset_name", "dataset_config", "dataset_train_split", "train_limit")
        return {name: getattr(self, name) for name in names}


def _from_json(name: str, value: Any, kind: type) -> Any:
    """A mapping or list, as YAML has it or in the JSON of a command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise OrdMoEConfigError(f"{name} is not JSON: {value!r} ({error}).") from error
    if value is not None and not isinstance(value, kind):
        raise OrdMoEConfigError(f"{name} must be a {'mapping' if kind is dict else 'list'}, got {value!r}.")
    return value


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
        changes (`dict`, *optional*): the cell's settings and those being tried; None is the base without training.
        seed (`int`, *optional*): the run's seed; the base has none.
    """

    phase: str
    changes: dict[str, Any] | None
    seed: int | None = None


def describe(settings: dict[str, Any]) -> str:
    """Settings as a name for people."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def baseline_name(settings: dict[str, Any]) -> str:
    """What the baseline is called, where it was given no name."""
    is_sft = settings.get("num_tiers") == 1
    return "SFT (C = 1)" if is_sft else f"baseline: {describe(settings) or 'common settings'}"


def make_cell(given: Mapping[str, Any], default_name: Callable[[dict[str, Any]], str] = describe) -> Cell:
    """The cell of settings that may hold a `name`."""
    settings = {name: value for name, value in given.items() if name != "name"}
    return Cell(str(given.get("name") or default_name(settings)), settings)


def make_cells(grid: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells of a grid and of an explicit list; without either, the common settings."""
    points = combinations(grid) if grid else []
    return [make_cell(given) for given in (*points, *cells)] or [Cell("OrdMoE")]


def combinations(axes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the axes' values (the cartesian product).

    Raises:
        [`OrdMoEConfigError`]: an axis without values.
    """
    for name, values in axes.items():
        check_axis(name, values)
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def check_axis(name: str, values: Any) -> None:
    """Raise [`OrdMoEConfigError`] unless `name` has a list of values to take."""
    if not isinstance(values, list) or not values:
        raise OrdMoEConfigError(f"{name} needs a list of values to try, got {values!r}.")
