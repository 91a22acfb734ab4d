"""`ordmoe tiers MODEL --dataset_name DATA`: are the tiers ordered by quality, and how different are their experts?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from torch import nn
from trl import TrlParser

from ..analysis.evaluation import OVERALL
from ..analysis.quality import TierQuality, tier_quality
from ..analysis.quality_reading import read_quality
from ..config import OrdMoEConfig
from ..errors import OrdMoEConfigError
from .arguments import ModelArguments
from .loading import load_adapter, load_base, load_processing_class, load_split
from .tables import percent, print_table


ORDERS = {
    "ends": "first over last tier",
    "full": "all tiers in order",
    "ends_no_eos": "first over last, without end tokens",
    "full_no_eos": "all in order, without end tokens",
}


@dataclass
class TiersArguments:
    """Whose tiers to measure, and on what."""

    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of an adapter; the base without."})
    dataset_name: str | None = field(default=None, metadata={"help": "Folder or hub id of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    split: str = field(default="test", metadata={"help": "Its split."})
    limit: int = field(default=512, metadata={"help": "Measure at most this many samples, drawn by seed 0."})
    num_tiers: int | None = field(default=None, metadata={"help": "Tiers C; the adapter's by default, else 3."})
    grouping: str | None = field(
        default=None, metadata={"help": "How tiers are cut; the adapter's by default, else uniform."}
    )
    group_by: str | None = field(default=None, metadata={"help": "Column whose values get an accuracy of their own."})
    rating_column: str | None = field(
        default=None, metadata={"help": "Column of numbers to correlate routing with; exact match by default."}
    )
    random_control: bool = field(default=True, metadata={"help": "Measure the order of random groups, too."})
    diversity_tokens: int = field(default=256, metadata={"help": "Tokens that expert outputs are compared on."})
    show: int = field(default=5, metadata={"help": "Samples whose answers are shown tier by tier."})
    batch_size: int = field(default=32, metadata={"help": "Samples at a time."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to generate, greedily."})
    seed: int = field(default=0, metadata={"help": "What random groups are drawn from."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
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
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model_name_or_path", *arguments]
    model_options, options = build_parser().parse_args_and_config(arguments)
    if options.limit < 1:
        raise OrdMoEConfigError(f"limit must be at least 1, got {options.limit}.")
    dataset = load_split(options.dataset_name, options.dataset_config, options.split)
    dataset = dataset.shuffle(seed=0).select(range(min(options.limit, len(dataset))))
    processing_class = load_processing_class(model_options, options.trust_remote_code)
    model = load_base(model_options, options.trust_remote_code)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
    defaults = adapter_config(model)
    quality = tier_quality(
        model,
        processing_class,
        dataset,
        num_tiers=defaults.num_tiers if options.num_tiers is None else options.num_tiers,
        grouping=defaults.grouping if options.grouping is None else options.grouping,
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
    if options.output is not None:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(quality.to_dict(), indent=2) + "\n")
        print(f"Results in {path}")
    if options.report is not None:
        # Draws with matplotlib, which is an extra.
        from ..analysis.report import tiers_report

        tiers_report(quality.to_dict(), options.report)
        print(f"Report in {options.report}")


def adapter_config(model: nn.Module) -> OrdMoEConfig:
    """The settings of the adapter on `model`, the defaults where it has none or a plain LoRA adapter."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config if isinstance(config, OrdMoEConfig) else OrdMoEConfig()


def print_quality(quality: TierQuality) -> None:
    """All figures as tables, then what they say."""
    _print_tiers(quality)
    _print_order(quality)
    _print_layers(quality)
    if quality.texts:
        columns = ("prompt", "reference", *(f"tier {tier.tier}" for tier in quality.tiers))
        rows = [(text.prompt, text.reference, *text.answers) for text in quality.texts]
        print_table("Answers side by side", columns, rows)
    for sentence in read_quality(quality):
        print(f"- {sentence}")


def _print_tiers(quality: TierQuality) -> None:
    groups = [key for key in quality.tiers[0].accuracy if key != OVERALL]
    rows = [
        (
            str(tier.tier),
            *(percent(tier.accuracy[key]) for key in [*groups, OVERALL]),
            f"{tier.log_likelihood:.3f}",
            f"{tier.log_likelihood_no_eos:.3f}",
        )
        for tier in quality.tiers
    ]
    columns = ("tier", *groups, OVERALL, "log-likelihood", "without end tokens")
    print_table("Exact match, and mean log-likelihood per answer token (nats)", columns, rows)


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


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
