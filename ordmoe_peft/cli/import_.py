"""`ordmoe import SOURCE MODEL --output_dir DIR`: a LoRA adapter of another tool as an OrdMoE adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..tools.imports.convert import import_adapter
from ..tools.imports.layouts import SOURCE_LAYOUTS
from .parser import CommandParser


@dataclass
class ImportArguments:
    """What to import, for which base, and how the file holds its experts."""

    source: str = field(metadata={"help": "Folder of the LoRA adapter, in safetensors."})
    model_name_or_path: str = field(
        metadata={
            "help": "Folder or hub id of the base; of a folder's weights, routers and embeddings are read.",
            "aliases": ["--base"],
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write to; must not exist."})
    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit of the base on the hub.", "aliases": ["--base_revision"]},
    )
    source_layout: str = field(
        default="auto",
        metadata={
            "help": "How the file holds experts: auto tells by shapes, names and tags; peft is PEFT from 0.19.1, "
            "peft-0.18 PEFT up to 0.19.0, unsloth Unsloth before its tag lora_B_layout, per-expert a key for each.",
            "choices": list(SOURCE_LAYOUTS),
        },
    )
    num_tiers: int = field(default=1, metadata={"help": "Tiers C of the OrdMoE adapter; LoRA is trained without."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the base."})


def build_parser() -> CommandParser:
    return CommandParser(
        "import",
        (ImportArguments,),
        {"source": "SOURCE", "model_name_or_path": "MODEL"},
        needed="--output_dir DIR",
        description="Make a plain LoRA adapter of PEFT, Unsloth or with keys for each expert an OrdMoE adapter.",
    )


def main(arguments: Sequence[str]) -> None:
    (options,) = build_parser().parse_args_and_config(arguments)
    imported = import_adapter(
        options.source,
        options.output_dir,
        options.model_name_or_path,
        options.source_layout,
        options.num_tiers,
        options.model_revision,
        options.trust_remote_code,
    )
    print(
        f"Read as {imported.layout}: LoRA of rank {imported.rank} on {', '.join(imported.targets)}, {imported.adapted} "
        f"weights; {imported.filled} more of these roles, which the source leaves alone, have zeros.\n"
        f"OrdMoE adapter in {options.output_dir}"
    )
