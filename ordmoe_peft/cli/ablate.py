"""`ordmoe ablate --config ablation.yaml`: compare settings with a baseline, fairly, over several seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from trl import TrlParser

from ..data.samples import check_counts, check_samples
from ..errors import OrdMoEConfigError
from ..files import write_whole
from ..moe_model import find_moe_layers
from ..monitoring.diagnostics import ablation_findings
from ..tiers.plan import make_plan
from ..tiers.routing import settings_of
from ..tools.ablate.ablation import BASE, METRICS, Ablation, Cell, Run, RunFiles, describe, make_cells
from ..tools.ablate.run import data_seed, evaluate_run, train_run
from ..tools.ablate.settings import Settings
from ..tools.report import ablate_report, require_matplotlib
from ..training import OrdMoETrainingArguments
from ..training.data_checks import checked_data
from .arguments import AdapterArguments, ModelArguments
from .loading import limited, load_base, load_processing_class, load_split, warn_if_slow
from .tables import print_table


COLUMNS = (
    *("", "chosen", "mean ± s.e.", "difference [95 %]", "verdict"),
    *("log-likelihood", "difference [95 %]", "verdict", "s/step"),
)
METRIC_COLUMNS, LIKELIHOOD_COLUMNS = (0, 1, 2, 3, 4, 8), (0, 5, 6, 7)


@dataclass
class AblateArguments:
    """What to compare, and on what. All other options are the settings common to all cells."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or hub id of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split that settings are chosen on."})
    test_split: str = field(default="test", metadata={"help": "Split that is read once, for the chosen settings."})
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
    metric: str = field(default="accuracy", metadata={"help": f"What validation chooses by: one of {tuple(METRICS)}."})
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
        if not all(isinstance(cell, dict) for cell in self.cells):
            raise OrdMoEConfigError(f"cells must be mappings of options to values, got {self.cells}.")
        splits = (self.dataset_train_split, self.validation_split, self.test_split)
        if len(set(splits)) < 3:
            raise OrdMoEConfigError(f"Training, validation and test need a split each, got {splits}.")
        counts = ("train_limit", "validation_limit", "test_limit", "max_new_tokens")
        check_counts(**{name: getattr(self, name) for name in counts})


def _from_json(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise OrdMoEConfigError(f"{name} is not JSON: {value!r} ({error}).") from error
    if value is not None and not isinstance(value, kind):
        raise OrdMoEConfigError(f"{name} must be a {'mapping' if kind is dict else 'list'}, got {value!r}.")
    return value


def build_parser() -> TrlParser:
    return TrlParser(
        (ModelArguments, AdapterArguments, AblateArguments, OrdMoETrainingArguments),
        prog="ordmoe ablate",
        description="Compare settings with a baseline over several seeds. Options can also stand in a YAML file given "
        "as --config; those of `ordmoe train` are the settings common to all cells.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, adapter_options, options, training_args = build_parser().parse_args_and_config(arguments)
    bench = Bench(model_options, options, training_args)
    settings = Settings(adapter_options, training_args, bench.fixed())
    ablation = make_ablation(options, settings, bench)
    for note in ablation.same_runs():
        print(f"Note: {note}")
    if options.dry_run:
        print_plan(ablation)
        return
    if options.report is not None:
        require_matplotlib()
    bench.check_data()
    base = bench.load_base()
    check_cells(ablation, settings, base)
    if training_args.device.type == "cpu":
        warn_if_slow(model_options, base.dtype, training_args)
    del base
    remaining = _remaining(ablation)
    with tqdm(total=remaining, desc="Ablation", unit="run") as bench.bar:
        results = ablation.run()
    results["notes"] += [finding.message for finding in ablation_findings(results)]
    finish(results, options, Path(training_args.output_dir))


def make_ablation(options: AblateArguments, settings: Settings, bench: "Bench") -> Ablation:
    """The ablation that was asked for, every name and value in it checked."""
    baseline = dict(options.baseline)
    name = str(baseline.pop("name", None) or _baseline_name(baseline))
    settings.check_names(options.tune, "tune")
    settings.check_names(options.grid, "grid")
    settings.check_names(baseline, "baseline")
    cells = make_cells(options.grid, options.cells)
    for cell in cells:
        settings.check_names(cell.settings, f"The cell {cell.name!r}")

    def typed(changes: dict[str, Any]) -> dict[str, Any]:
        return {name: settings.typed(name, value) for name, value in changes.items()}

    tune = {
        name: [settings.typed(name, value) for value in values] if isinstance(values, list) else values
        for name, values in options.tune.items()
    }
    bench.settings = settings
    ablation = Ablation(
        Cell(name, typed(baseline)),
        [Cell(cell.name, typed(cell.settings)) for cell in cells],
        tune,
        options.seeds,
        options.tune_seeds or options.seeds,
        options.metric,
        key=bench.key,
        have_effect=settings.have_effect,
        execute=bench.execute,
        files=RunFiles(Path(settings.training.output_dir) / "runs"),
    )
    for cell in ablation.rows:
        for option in ablation.options(cell):
            settings.build({**cell.settings, **option})
    return ablation


def _baseline_name(settings: dict[str, Any]) -> str:
    return "SFT (C = 1)" if settings.get("num_tiers") == 1 else f"baseline: {describe(settings) or 'common settings'}"


def check_cells(ablation: Ablation, settings: Settings, model: Any) -> None:
    """See that every cell's tiers fit the model, before anything runs."""
    layers = find_moe_layers(model)
    for cell in ablation.rows:
        for option in ablation.options(cell):
            config, _ = settings.build({**cell.settings, **option})
            make_plan(layers, 1, settings_of(config))


class Bench:
    """Executes runs on the base and data that the options name."""

    def __init__(self, model_options: ModelArguments, options: AblateArguments, training_args: OrdMoETrainingArguments):
        self.model_options, self.options, self.training_args = model_options, options, training_args
        self.settings: Settings | None = None
        self.bar: tqdm | None = None
        self._splits: dict[str, Any] = {}
        self._processing_class = None

    def fixed(self) -> dict[str, Any]:
        """What decides results beside the adapter and training."""
        options = self.options
        return {
            "model": asdict(self.model_options),
            "data": {
                name: getattr(options, name)
                for name in ("dataset_name", "dataset_config", "dataset_train_split", "train_limit")
            },
        }

    def key(self, run: Run) -> dict[str, Any]:
        """What tells a run from others."""
        options = self.options
        tunes = run.phase == "tune"
        key = dict(self.settings.fixed) if run.changes is None else self.settings.key(run.changes)
        key["evaluation"] = {
            "split": options.validation_split if tunes else options.test_split,
            "limit": options.validation_limit if tunes else options.test_limit,
            "group_by": options.group_by,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": self.training_args.per_device_eval_batch_size,
        }
        return {**key, "phase": run.phase, "seed": run.seed, "data_seed": self.training_args.data_seed}

    def execute(self, run: Run) -> dict[str, Any]:
        """Train, unless it is the base, and evaluate."""
        if run.changes is None:
            model, record = self.load_base(), {}
        else:
            config, args = self.settings.build(run.changes)
            model, record = train_run(
                self.load_base, config, args, run.seed, self.train_dataset(args, run.seed), self.processing_class
            )
        evaluation = self.key(run)["evaluation"]
        split, limit = evaluation.pop("split"), evaluation.pop("limit")
        dataset = limited(self._split(split), limit, 0)
        results = evaluate_run(model, self.processing_class, dataset, scores_tiers=run.phase == "final", **evaluation)
        record = {"phase": run.phase, "seed": run.seed, **record, "evaluation": {"split": split, **results}}
        self._report(run, record)
        return record

    def check_data(self) -> None:
        """See that all splits are there, with answers to learn from or to judge by, before anything runs."""
        checked_data(self._split(self.options.dataset_train_split), self.training_args, "training")
        for name in (self.options.validation_split, self.options.test_split):
            check_samples(self._split(name), self.options.group_by)

    def load_base(self) -> Any:
        return load_base(self.model_options, self.training_args.trust_remote_code)

    @property
    def processing_class(self) -> Any:
        if self._processing_class is None:
            self._processing_class = load_processing_class(self.model_options, self.training_args.trust_remote_code)
        return self._processing_class

    def train_dataset(self, args: OrdMoETrainingArguments, seed: int) -> Any:
        return limited(self._split(self.options.dataset_train_split), self.options.train_limit, data_seed(args, seed))

    def _split(self, name: str) -> Any:
        if name not in self._splits:
            self._splits[name] = load_split(self.options.dataset_name, self.options.dataset_config, name)
        return self._splits[name]

    def _report(self, run: Run, record: dict[str, Any]) -> None:
        evaluation = record["evaluation"]
        count = len(evaluation["is_right"])
        line = f"{run.phase} {BASE if run.changes is None else describe(run.changes)}"
        if run.changes is not None:
            line += f", seed {run.seed} ({record['train_seconds']:.1f} s)"
        line += (
            f": accuracy {sum(evaluation['is_right']) / count:.1%}, log-likelihood "
            f"{sum(evaluation['log_likelihood']) / count:.3f} on {count} of {evaluation['split']} "
            f"({evaluation['evaluate_seconds']:.1f} s)"
        )
        tqdm.write(line)
        if self.bar is not None:
            self.bar.update()


def _remaining(ablation: Ablation) -> int:
    paths = set()
    count = 0
    for _, run, done in ablation.planned():
        if done is None:
            count += 1
        elif not done:
            paths.add(ablation.files.path(run, ablation.key(run)))
    return count + len(paths)


def print_plan(ablation: Ablation) -> None:
    """A row per run, and how many remain."""
    states = {True: "done", False: "to run", None: "after choosing"}
    rows = [
        [
            name,
            run.phase,
            describe(run.changes or {}) + (", …" if done is None else ""),
            "" if run.seed is None else str(run.seed),
            states[done],
        ]
        for name, run, done in ablation.planned()
    ]
    print_table("Runs", ("", "phase", "settings", "seed", "state"), rows)
    print(f"{_remaining(ablation)} runs remain; equal ones are run once.")


# ------------------------------------------------------------------------------------------------------------ results
def finish(results: dict[str, Any], options: AblateArguments, folder: Path) -> None:
    """Print the table and write the results as JSON and Markdown, and the report on request."""
    rows = [table_row(cell, results["metric"]) for cell in results["cells"]]
    title = (
        f"{results['metric']} ({results['unit']}) and log-likelihood (nats per token) on {options.test_split}, with "
        f"differences to {results['baseline']}"
    )
    # Two tables, because one of all columns is wider than most terminals.
    for heading, shown in ((title, METRIC_COLUMNS), ("Log-likelihood of the answers", LIKELIHOOD_COLUMNS)):
        print_table(heading, [COLUMNS[index] for index in shown], [[row[index] for index in shown] for row in rows])
    for note in results["notes"]:
        print(f"Note: {note}")
    paths = [folder / f"{options.results_name}{ending}" for ending in (".json", ".md")]
    texts = (json.dumps(results, indent=2) + "\n", markdown(title, rows, results["notes"]))
    for path, text in zip(paths, texts, strict=True):
        write_whole(path, text)
    print(f"Results in {paths[0]} and {paths[1]}")
    if options.report is not None:
        print(f"Report: {ablate_report(results, options.report)}")


def table_row(cell: dict[str, Any], metric: str) -> list[str]:
    """A cell of the results as texts."""
    digits = 2 if metric == "accuracy" else 3
    likelihood = cell["log_likelihood"]
    seconds = cell["seconds_per_step"]
    return [
        cell["name"],
        describe(cell["chosen"]),
        _with_error(cell["mean"], cell["stderr"], digits),
        *_difference(cell["difference"], digits),
        _with_error(likelihood["mean"], likelihood["stderr"], 3),
        *_difference(likelihood["difference"], 3),
        "" if seconds is None else f"{seconds:.2f}",
    ]


def _with_error(mean: float, stderr: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _difference(difference: dict[str, Any] | None, digits: int) -> tuple[str, str]:
    if difference is None:
        return "", ""
    mean, low, high = (f"{difference[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]", difference["verdict"]


def markdown(title: str, rows: list[list[str]], notes: list[str]) -> str:
    """The table and its notes in Markdown."""
    lines = [title, "", _pipes(COLUMNS), _pipes(["---"] * len(COLUMNS)), *map(_pipes, rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def _pipes(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"
