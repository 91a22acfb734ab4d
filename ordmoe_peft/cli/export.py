"""`ordmoe export`: an OrdMoE adapter as a plain LoRA adapter."""

import argparse
from collections.abc import Sequence

from ..tools.export.plain_peft import export_plain_lora


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ordmoe export", description="Write an OrdMoE adapter as a LoRA adapter that plain PEFT loads."
    )
    parser.add_argument("adapter", help="folder of the OrdMoE adapter")
    parser.add_argument("--output", required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    export_plain_lora(options.adapter, options.output)
    print(f"Plain LoRA adapter in {options.output}")
