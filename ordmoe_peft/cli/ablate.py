"""`ordmoe ablate --config ablation.yaml`: compare settings with a baseline, fairly, over several seeds."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..tools.ablate import tables
from ..tools.ablate.ablation import Ablation
from ..tools.ablate.grid import METRICS, AblateArguments, other_metric
from ..tools.ablate.runner import AblationRunner
from ..tools.ablate.settings import Settings
from ..tools.report import ablate_report
from ..tools.tables import markdown
from ..training import OrdMoETrainingArguments
from .arguments import AdapterArguments, ModelArguments
from .loading import load_base, load_processing_class, load_split, warn_if_slow
from .parser import CommandParser
from .tables import print_table


def build_parser() -> CommandParser:
    return CommandParser(
        "ablate",
        (ModelArguments, AdapterArguments, AblateArguments, OrdMoETrainingArguments),
        needed="--dataset_name DATA --output_dir DIR",
        description="Compare settings with a baseline over several seeds. Options of `ordmoe train` are the settings "
        "common to all cells.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, adapter_options, options, training_args = build_parser().parse_args_and_config(arguments)
    fixed = {"model": model_options.that_decide(), "data": options.training_data()}
    runner = AblationRunner(
        options,
        Settings(adapter_options, training_args, fixed),
        partial(load_base, model_options, training_args.trust_remote_code),
        partial(load_processing_class, model_options, training_args.trust_remote_code),
        partial(load_split, options.dataset_name, options.dataset_config),
    )
    ablation = Ablation(options, runner)
    for note in ablation.same_runs():
        print(f"Note: {note}")
    if options.dry_run:
        print_table("Runs", tables.PLAN_COLUMNS, tables.plan_rows(ablation))
        print(f"{ablation.remaining()} runs remain; equal ones are run once.")
        return
    runner.check_data()
    base = runner.load_base()
    ablation.check_tiers(base)
    if training_args.device.type == "cpu":
        warn_if_slow(model_options, base.dtype, training_args)
    del base
    show(ablation.run(), options, Path(training_args.output_dir))


def show(results: dict[str, Any], options: AblateArguments, folder: Path) -> None:
    """Print the table and write the results as JSON and Markdown, and the report on request."""
    rows, columns = tables.result_rows(results), tables.columns(results)
    both = [f"{metric} ({METRICS[metric][0]})" for metric in (results["metric"], other_metric(results["metric"]))]
    title = f"{' and '.join(both)} on {options.dataset_test_split}, with differences to {results['baseline']}"
    # Two tables, because one of all columns is wider than most terminals.
    for heading, indices in {title: tables.METRIC_COLUMNS, both[1]: tables.OTHER_COLUMNS}.items():
        print_table(heading, [columns[index] for index in indices], [[row[index] for index in indices] for row in rows])
    for note in results["notes"]:
        print(f"Note: {note}")
    as_json, as_markdown = (folder / f"{options.results_name}{ending}" for ending in (".json", ".md"))
    write_whole(as_json, json.dumps(results, indent=2) + "\n")
    write_whole(as_markdown, markdown(title, columns, rows, results["notes"]))
    print(f"Results in {as_json} and {as_markdown}")
    if options.report is not None:
        print(f"Report: {ablate_report(results, options.report)}")
