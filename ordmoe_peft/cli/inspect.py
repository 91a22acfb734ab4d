"""`ordmoe inspect MODEL --dataset_name …`: whether a model's routing can be cut into tiers, by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import TrlParser

from ..monitoring.diagnostics import health_findings
from ..tools.measure.inspection import HealthReport, inspect_model
from ..tools.measure.verdict import NEXT_STEP
from ..tools.report import inspect_report, require_matplotlib
from .arguments import ModelArguments, SampleArguments, with_model_first
from .loading import load_samples, load_subject, tier_cut
from .tables import print_findings, print_table, write_json


# More reasons than this are for the JSON file: a cause often holds in every layer.
MAX_PRINTED_REASONS = 12
_DRIFT_LEGEND = ";\noverlap, KL: experts in common with the router without its adapter, and divergence from it in nats"


@dataclass(kw_only=True)
class InspectArguments(SampleArguments):
    """What to inspect, and on what."""

    split: str = field(default="train", metadata={"help": "Its split."})
    limit: int | None = field(default=256, metadata={"help": "Most samples to run, drawn by seed 0."})
    output: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})
    report: str | None = field(default=None, metadata={"help": "Folder to write a report with plots to."})


def build_parser() -> TrlParser:
    return TrlParser(
        (ModelArguments, InspectArguments),
        prog="ordmoe inspect",
        description="Say whether a model's routing can be cut into tiers: `ordmoe inspect MODEL --dataset_name DATA`. "
        "Whether a higher tier answers better is what `ordmoe tiers` measures. "
        "MODEL stands first, or is given as --model_name_or_path. Options can also stand in a YAML file given as "
        "--config.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(with_model_first(arguments))
    if options.report is not None:
        require_matplotlib()
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    report = inspect_model(
        model,
        processing_class,
        dataset,
        **tier_cut(model, options),
        batch_size=options.batch_size,
    )
    print_health(f"{options.adapter or report.model} on {report.num_tokens:,} tokens of {options.split}", report)
    results = report.to_dict()
    findings = health_findings(results)
    print_findings(findings)
    if options.output is not None:
        write_json(options.output, results)
    if options.report is not None:
        results["findings"] = [finding.to_dict() for finding in findings]
        print(f"Report: {inspect_report(results, options.report)}")


def print_health(title: str, report: HealthReport) -> None:
    """A row per layer, what the columns mean, and the verdict."""
    has_drift = any(layer.drift_kl is not None for layer in report.layers)
    columns = ["layer", "E", "K", "dead", "min use", "max use", "marginal H", "token H", "score std", "gate mass"]
    columns += ["overlap", "KL"] * has_drift
    rows = []
    for layer in report.layers:
        sizes = [layer.layer, layer.num_experts, layer.top_k, layer.dead]
        figures = [min(layer.utilisation), layer.imbalance, layer.marginal_entropy, layer.token_entropy]
        gate_mass = " ".join(f"{mass:.2f}" for mass in layer.gate_mass)
        drift = [_figure(layer.drift_overlap), _figure(layer.drift_kl)] if has_drift else []
        rows.append([*map(str, sizes), *map(_figure, [*figures, layer.score_std]), gate_mass, *drift])
    print_table(title, columns, rows)
    print(
        "use: an expert's tokens over the fair share K/E (1 is fair); H: entropy over ln E, of the mean router "
        "distribution and of a token's;\nscore std: spread of a token's router logits; gate mass: sum of the weights "
        "that the router gives each tier's experts, tier 1 first" + _DRIFT_LEGEND * has_drift
    )
    print_verdict(report)


def print_verdict(report: HealthReport) -> None:
    """Whether tiers can be cut, and why not."""
    if report.is_fit:
        print(f"Tiers can be cut: {report.num_tiers} ({report.grouping}). {NEXT_STEP}")
        return
    print(f"Not fit to be cut into {report.num_tiers} tiers ({report.grouping}):")
    for reason in report.reasons[:MAX_PRINTED_REASONS]:
        print(f"- {reason}")
    if len(report.reasons) > MAX_PRINTED_REASONS:
        print(f"- … and {len(report.reasons) - MAX_PRINTED_REASONS} more; --output FILE has all of them.")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
