"""`ordmoe precision MODEL --dataset_name …`: is 4 bits sound for this base?"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..tools.measure.four_bits import measure_four_bits
from .arguments import ModelArguments, SampleArguments
from .loading import load_base, load_processing_class, load_samples
from .parser import CommandParser
from .tables import print_tables, write_json


@dataclass
class BothArguments(ModelArguments):
    """Which base to load dense and in 4 bits, and how."""

    load_in_4bit: bool = field(default=True, init=False)
    # Where the dense base fits, so does that in 4 bits.
    offload_experts: bool = field(default=False, init=False)


@dataclass(kw_only=True)
class PrecisionArguments(SampleArguments):
    """What to compare them on: the base alone, as it is."""

    adapter: None = field(default=None, init=False)
    ignore_fingerprint: bool = field(default=False, init=False)
    num_tiers: None = field(default=None, init=False)
    grouping: None = field(default=None, init=False)
    limit: int | None = field(default=256, metadata={"help": "Most samples to run, drawn by seed 0."})
    output_file: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})


def build_parser() -> CommandParser:
    return CommandParser(
        "precision",
        (BothArguments, PrecisionArguments),
        needed="--dataset_name DATA",
        description="Say what 4 bits change in a base. It runs in 4 bits and then dense on the same samples; its "
        "experts, its routing and the likelihood of answers are compared.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_samples(options)
    processing_class = load_processing_class(model_options, options.trust_remote_code)
    device_map = {"": torch.accelerator.current_accelerator()} if torch.accelerator.is_available() else None

    def load(in_4_bits: bool) -> torch.nn.Module:
        model_options.load_in_4bit = in_4_bits
        return load_base(model_options, options.trust_remote_code, device_map)

    result = measure_four_bits(load, processing_class, dataset, batch_size=options.per_device_eval_batch_size)
    recipe = model_options.bnb_4bit_quant_type + ", nested" * model_options.use_bnb_nested_quant
    print(f"{result.model} in 4 bits ({recipe}) beside {result.dtype}, on {len(dataset)} samples of {dataset.split}")
    print_tables(result.tables())
    print(result.verdict)
    if options.output_file is not None:
        write_json(options.output_file, result.to_dict())
