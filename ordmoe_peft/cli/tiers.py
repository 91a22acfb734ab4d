"""`ordmoe tiers MODEL --dataset_name DATA`: are the tiers ordered by quality, and how different are their experts?"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import TrlParser

from ..monitoring.diagnostics import quality_findings
from ..tools.measure.quality import TierQuality, tier_quality
from ..tools.report import require_matplotlib, tiers_report
from .arguments import ModelArguments, SampleArguments, with_model_first
from .evaluate import print_results
from .loading import load_samples, load_subject, tier_cut
from .tables import percent, print_findings, print_table, write_json


ORDERS = {
    "ends": "first over last tier",
    "full": "all tiers in order",
    "ends_no_eos": "first over last, without end tokens",
    "full_no_eos": "all in order, without end tokens",
}


@dataclass(kw_only=True)
class TiersArguments(SampleArguments):
    """Whose tiers to measure, and on what."""

    limit: int | None = field(default=512, metadata={"help": "Measure at most this many samples, drawn by seed 0."})
    group_by: str | None = field(default=None, metadata={"help": "Column whose values get an accuracy of their own."})
    rating_column: str | None = field(
        default=None, metadata={"help": "Column of numbers to correlate routing with; exact match by default."}
    )
    random_control: bool = field(default=True, metadata={"help": "Measure the order of random groups, too."})
    diversity_tokens: int = field(default=256, metadata={"help": "Tokens that expert outputs are compared on."})
    show: int = field(default=5, metadata={"help": "Samples whose answers are shown tier by tier."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to generate, greedily."})
    seed: int = field(default=0, metadata={"help": "What random groups are drawn from."})
    output: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})
    report: str | None = field(default=None, metadata={"help": "Folder to write a report with plots to."})


def build_parser() -> TrlParser:
    return TrlParser(
        (ModelArguments, TiersArguments),
        prog="ordmoe tiers",
        usage="ordmoe tiers MODEL --dataset_name DATA [options]",
        description="Measure what each tier of a base or an adapter is worth. MODEL may also be given as "
        "--model_name_or_path; options can also stand in a YAML file given as --config.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(with_model_first(arguments))
    if options.report is not None:
        require_matplotlib()
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    quality = tier_quality(
        model,
        processing_class,
        dataset,
        **tier_cut(model, options),
        group_by=options.group_by,
        rating_column=options.rating_column,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        random_control=options.random_control,
        diversity_tokens=options.diversity_tokens,
        show=options.show,
        seed=options.seed,
        name=options.adapter or model_options.model_name_or_path,
    )
    print(f"{quality.model} on {quality.num_samples} samples of {options.split}, {quality.grouping} tiers")
    print_quality(quality)
    results = quality.to_dict()
    findings = quality_findings(results)
    print_findings(findings)
    if not findings:
        print("No known failure signature showed.")
    if options.output is not None:
        write_json(options.output, results)
    if options.report is not None:
        results["findings"] = [finding.to_dict() for finding in findings]
        print(f"Report: {tiers_report(results, options.report)}")


def print_quality(quality: TierQuality) -> None:
    """All figures as tables."""
    print_results(quality.tiers)
    _print_order(quality)
    _print_layers(quality)
    if quality.texts:
        columns = ("prompt", "reference", *(f"tier {tier.tier}" for tier in quality.tiers))
        rows = [(text.prompt, text.reference, *text.answers) for text in quality.texts]
        print_table("Answers side by side", columns, rows)


def _print_order(quality: TierQuality) -> None:
    rows = []
    for key, label in ORDERS.items():
        order = quality.order[key]
        random = "" if order.random is None else f"{percent(order.random)} ± {100 * order.random_stderr:.1f}"
        rows.append((label, f"{percent(order.share)} ± {100 * order.stderr:.1f}", random, percent(order.chance)))
    columns = ("likelihood falls from", "samples ± s.e.", "random groups", "chance")
    print_table("Share of samples in order", columns, rows)


def _print_layers(quality: TierQuality) -> None:
    found = quality.spearman
    columns = (
        "MoE layer",
        "rho within tier 1",
        "rho over tiers",
        *(f"cosine tier {tier.tier}" for tier in quality.tiers),
    )
    rows = [
        (str(layer), _figure(within, "+.3f"), _figure(pooled, "+.3f"), *(_figure(cosine, ".3f") for cosine in cosines))
        for layer, (within, pooled, cosines) in enumerate(
            zip(found.within_top.layers, found.pooled.layers, quality.diversity, strict=True)
        )
    ]
    overall = (_figure(found.within_top.overall, "+.3f"), _figure(found.pooled.overall, "+.3f"))
    rows.append(("overall", *overall, *[""] * quality.num_tiers))
    title = f"Spearman's rho of routing scores with {found.quality}; cosine between the outputs of a tier's experts"
    print_table(title, columns, rows)
    if found.within_top.stderr is not None:
        print(f"Standard error of rho within tier 1, where it is 0: {found.within_top.stderr:.3f}")
    if found.note is not None:
        print(found.note)


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
