"""`ordmoe tiers MODEL --dataset_name DATA`: are the tiers ordered by quality, and how different are their experts?"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from ..monitoring.diagnostics import quality_findings
from ..tools.measure.quality import QualityOptions, tier_quality
from ..tools.report import tiers_report
from .arguments import ModelArguments, SampleArguments
from .loading import load_samples, load_subject, tier_cut
from .parser import CommandParser
from .tables import print_findings, print_tables, write_json


@dataclass(kw_only=True)
class TiersArguments(SampleArguments, QualityOptions):
    """Whose tiers to measure, and on what."""

    limit: int | None = field(default=512, metadata={"help": "Measure at most this many samples, drawn by seed 0."})
    output_file: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})
    report: str | None = field(default=None, metadata={"help": "Folder to write a report with plots to."})


def build_parser() -> CommandParser:
    return CommandParser(
        "tiers",
        (ModelArguments, TiersArguments),
        needed="--dataset_name DATA",
        description="Measure what each tier of a base or an adapter is worth.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    quality = tier_quality(
        model,
        processing_class,
        dataset,
        **tier_cut(model, options),
        batch_size=options.per_device_eval_batch_size,
        name=options.adapter or model_options.model_name_or_path,
        **{one.name: getattr(options, one.name) for one in fields(QualityOptions)},
    )
    print(f"{quality.model} on {quality.num_samples} samples of {dataset.split}, {quality.grouping} tiers")
    print_tables(quality.tables())
    findings = quality_findings(quality.to_dict())
    print_findings(findings)
    if not findings:
        print("No known failure signature showed.")
    if options.output_file is not None:
        write_json(options.output_file, quality.to_dict())
    if options.report is not None:
        print(f"Report: {tiers_report(quality, options.report, findings)}")
