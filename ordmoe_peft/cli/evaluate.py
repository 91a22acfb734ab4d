"""`ordmoe evaluate`: exact match of generated answers and likelihood of the reference answers, per tier."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from ..analysis.evaluation import OVERALL, TierResult, evaluate_tiers
from .arguments import ModelArguments
from .loading import load_adapter, load_base, load_processing_class, load_split
from .tables import percent, print_table


@dataclass
class EvaluateArguments:
    """What to evaluate, and on what."""

    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of an adapter; the base without."})
    dataset_name: str | None = field(default=None, metadata={"help": "Folder or hub id of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    split: str = field(default="test", metadata={"help": "Its split."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate only this many samples, drawn by seed 0."})
    tiers: list[int] = field(default_factory=lambda: [1], metadata={"help": "Tiers to evaluate; 1 is the top."})
    num_tiers: int | None = field(default=None, metadata={"help": "Tiers C to cut; the adapter's by default."})
    grouping: str | None = field(default=None, metadata={"help": "How tiers are cut; the adapter's by default."})
    group_by: str | None = field(default=None, metadata={"help": "Column whose values get an accuracy of their own."})
    batch_size: int = field(default=32, metadata={"help": "Samples at a time."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to generate, greedily."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    output: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})


def build_parser() -> TrlParser:
    return TrlParser(
        (ModelArguments, EvaluateArguments),
        prog="ordmoe evaluate",
        description="Evaluate a base or an adapter. Options can also stand in a YAML file given as --config.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_split(options.dataset_name, options.dataset_config, options.split)
    if options.limit is not None:
        dataset = dataset.shuffle(seed=0).select(range(min(options.limit, len(dataset))))
    processing_class = load_processing_class(model_options, options.trust_remote_code)
    model = load_base(model_options, options.trust_remote_code)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
    results = evaluate_tiers(
        model,
        processing_class,
        dataset,
        options.tiers,
        group_by=options.group_by,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        num_tiers=options.num_tiers,
        grouping=options.grouping,
    )
    print(f"{options.adapter or model_options.model_name_or_path} on {len(dataset)} samples of {options.split}")
    print_results("Exact match, and mean log-likelihood per answer token (nats)", results)
    if options.output is not None:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
        print(f"Results in {path}")


def print_results(title: str, results: list[TierResult]) -> None:
    """A row per tier: accuracy per group and overall, mean log-likelihood in nats per token."""
    groups = [key for key in results[0].accuracy if key != OVERALL]
    columns = ["tier", *groups, OVERALL, "log-likelihood", "without end tokens"]
    rows = [
        [
            str(result.tier),
            *(percent(result.accuracy[key]) for key in [*groups, OVERALL]),
            f"{result.log_likelihood:.3f}",
            f"{result.log_likelihood_no_eos:.3f}",
        ]
        for result in results
    ]
    print_table(title, columns, rows)
