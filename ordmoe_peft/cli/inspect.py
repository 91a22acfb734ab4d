"""`ordmoe inspect MODEL --dataset_name …`: whether a model's routing can be cut into tiers, by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..monitoring.diagnostics import health_findings
from ..tools.measure.inspection import HealthReport, inspect_model
from ..tools.measure.verdict import NEXT_STEP
from ..tools.report import inspect_report
from .arguments import TRAIN_SPLIT, ModelArguments, SampleArguments
from .loading import load_samples, load_subject, tier_cut
from .parser import CommandParser
from .tables import print_findings, print_tables, write_json


# More reasons than this are for the JSON file: a cause often holds in every layer.
MAX_PRINTED_REASONS = 12


@dataclass(kw_only=True)
class InspectArguments(SampleArguments):
    """What to inspect, and on what."""

    likely_splits: ClassVar[tuple[str, ...]] = ("train",)
    needs_tiers: ClassVar[bool] = False  # that they do not fit is what it says

    dataset_split: str | None = field(default=None, metadata={"help": TRAIN_SPLIT})
    limit: int | None = field(default=256, metadata={"help": "Most samples to run, drawn by seed 0."})
    output_file: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})
    report: str | None = field(default=None, metadata={"help": "Folder to write a report with plots to."})


def build_parser() -> CommandParser:
    return CommandParser(
        "inspect",
        (ModelArguments, InspectArguments),
        needed="--dataset_name DATA",
        description="Say whether a model's routing can be cut into tiers. Whether a higher tier answers better is what "
        "`ordmoe tiers` measures.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    report = inspect_model(
        model, processing_class, dataset, **tier_cut(model, options), batch_size=options.per_device_eval_batch_size
    )
    print(f"{options.adapter or report.model} on {report.num_tokens:,} tokens of {dataset.split}")
    # Module names are too wide for a terminal.
    print_tables([replace(one, frame=one.frame.drop(columns="module")) for one in report.tables()])
    print_verdict(report)
    findings = health_findings(report.to_dict())
    print_findings(findings)
    if options.output_file is not None:
        write_json(options.output_file, report.to_dict())
    if options.report is not None:
        # Without findings, the verdict has said all.
        print(f"Report: {inspect_report(report, options.report, findings or None)}")


def print_verdict(report: HealthReport) -> None:
    """Whether tiers can be cut, and why not."""
    if report.is_fit:
        print(f"Tiers can be cut: {report.num_tiers} ({report.grouping}). {NEXT_STEP}")
        return
    tiers, reasons = f"{report.num_tiers} tiers ({report.grouping})", [*report.reasons, *report.unread]
    print(f"Not fit to be cut into {tiers}:" if report.reasons else f"Whether {tiers} can be cut is not known:")
    for reason in reasons[:MAX_PRINTED_REASONS]:
        print(f"- {reason}")
    if len(reasons) > MAX_PRINTED_REASONS:
        print(f"- … and {len(reasons) - MAX_PRINTED_REASONS} more; --output_file FILE has all of them.")
