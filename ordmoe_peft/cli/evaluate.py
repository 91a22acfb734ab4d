"""`ordmoe evaluate`: exact match of generated answers and likelihood of the reference answers, per tier."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..tools.measure.evaluation import evaluate_tiers, tier_table
from .arguments import ModelArguments, SampleArguments
from .loading import load_samples, load_subject
from .parser import CommandParser
from .tables import print_tables, write_json


@dataclass(kw_only=True)
class EvaluateArguments(SampleArguments):
    """What to evaluate, and on what."""

    tiers: list[int] = field(default_factory=lambda: [1], metadata={"help": "Tiers to evaluate; 1 is the top."})
    group_by: str | None = field(default=None, metadata={"help": "Column whose values get an accuracy of their own."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to generate, greedily."})
    output_file: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})


def build_parser() -> CommandParser:
    return CommandParser(
        "evaluate",
        (ModelArguments, EvaluateArguments),
        needed="--dataset_name DATA",
        description="Evaluate a base or an adapter: exact match of generated answers and likelihood of the data's own.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    results = evaluate_tiers(
        model,
        processing_class,
        dataset,
        options.tiers,
        group_by=options.group_by,
        batch_size=options.per_device_eval_batch_size,
        max_new_tokens=options.max_new_tokens,
        num_tiers=options.num_tiers,
        grouping=options.grouping,
    )
    print(f"{options.adapter or model_options.model_name_or_path} on {len(dataset)} samples of {dataset.split}")
    print_tables([tier_table(results)])
    if options.output_file is not None:
        write_json(options.output_file, [result.to_dict() for result in results])
