"""`ordmoe merge ADAPTER --output_dir DIR`: the base with an adapter merged into it, as a model of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..errors import OrdMoEConfigError
from ..tools.merge_on_disk.merge import MergeOptions, merge_checkpoint
from .arguments import DTYPES, IGNORE_FINGERPRINT, ModelArguments
from .parser import ADAPTER, CommandParser
from .tables import print_table


@dataclass(kw_only=True)
class MergeArguments(ModelArguments):
    """What to merge, into what, and how. `load_in_4bit` and its fields say how the base was loaded in training."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "aliases": ["--base"],
            "help": "Folder or hub id of the dense base; the one that the adapter names by default.",
        },
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of what is written; auto keeps each tensor's own.", "choices": ["auto", *DTYPES]},
    )
    attn_implementation: str | None = field(default=None, init=False)
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Round the base through the 4-bit recipe first, as the adapter saw it."},
    )
    requantize: bool = field(
        default=False, metadata={"help": "Pack the merged weights in 4 bits again, as load_in_4bit or the base says."}
    )
    adapter: str = field(metadata={"help": "Folder or hub id of the adapter."})
    output_dir: str = field(metadata={"help": "Folder to write to; must not exist."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file to write, such as 500MB."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the base."})
    ignore_fingerprint: bool = field(default=False, metadata={"help": IGNORE_FINGERPRINT})

    def written_dtype(self) -> torch.dtype | None:
        """The dtype that was asked for."""
        if self.dtype not in ("auto", *DTYPES):
            raise OrdMoEConfigError(f"dtype must be auto or one of {tuple(DTYPES)}, got {self.dtype!r}.")
        return DTYPES.get(self.dtype)


def build_parser() -> CommandParser:
    return CommandParser(
        "merge",
        (MergeArguments,),
        ADAPTER,
        needed="--output_dir DIR",
        description="Merge an adapter into its base on disk, stack by stack.",
    )


def main(arguments: Sequence[str]) -> None:
    (options,) = build_parser().parse_args_and_config(arguments)
    summary = merge_checkpoint(
        options.adapter,
        options.output_dir,
        MergeOptions(
            base=options.model_name_or_path,
            revision=options.model_revision,
            quantization_config=options.quantization_config(),
            requantize=options.requantize,
            dtype=options.written_dtype(),
            max_shard_size=options.max_shard_size,
            trust_remote_code=options.trust_remote_code,
            ignore_fingerprint=options.ignore_fingerprint,
            progressbar=True,
        ),
    )
    print_table(
        f"{options.adapter} merged into {summary.base}",
        ("merged weights", "rounded to 4 bits first", "copied tensors", "files", "size"),
        [
            (
                str(summary.merged),
                str(summary.rounded),
                str(summary.copied),
                str(summary.shards),
                f"{summary.num_bytes / 1e9:.2f} GB",
            )
        ],
    )
    if summary.report is not None:
        print(summary.report)
        if summary.report.warning():
            print(f"Warning: {summary.report.warning()}")
    print(f"Merged model in {options.output_dir}")
