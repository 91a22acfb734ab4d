"""`ordmoe families MODEL`: what of a model is covered and what is not, from its configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..tools.families import build_model, describe_family
from ..tools.plan.known_models import find_config
from .parser import CommandParser
from .tables import print_tables, write_json


# What can be refused → what it is called. Other refusals are of a role that LoRA cannot go on.
NAMES = {"tiers": "Tiers", "lora": "LoRA", "4 bits": "4 bits"}


@dataclass
class FamiliesArguments:
    """Which model, and where the report goes."""

    model_name_or_path: str = field(
        metadata={"help": "Folder, config.json or hub id of the model.", "aliases": ["--base"]}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})
    output_file: str | None = field(default=None, metadata={"help": "File to write the report to, as JSON."})


def build_parser() -> CommandParser:
    return CommandParser(
        "families",
        (FamiliesArguments,),
        description="Say what of a model is covered and what is not. Of MODEL, config.json alone is read.",
    )


def main(arguments: Sequence[str]) -> None:
    (options,) = build_parser().parse_args_and_config(arguments)
    name = options.model_name_or_path
    config = find_config(name, options.model_revision, options.trust_remote_code)
    report = describe_family(build_model(config, options.trust_remote_code), name)
    print_tables(report.tables())
    for what, called in NAMES.items():
        if what not in report.refused:
            print(f"{called}: yes")
    for what, why in report.refused.items():
        print(f"{NAMES.get(what, f'LoRA on {what}')}: refused: {why}")
    for part, number in report.left_alone.items():
        print(
            f"MoE layers left alone: {number} of {part}, which takes no text. Give that part by itself to "
            "`get_peft_model` or `tier_routing` to have them."
        )
    if options.output_file is not None:
        write_json(options.output_file, report.to_dict())
