"""The cards of exports: to plain PEFT, and for a server."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


@dataclass(frozen=True)
class ServingExport:
    """What was written for a server.

    Args:
        rank (`int`): the common rank.
        experts (`int`), linears (`int`), routers (`int`): modules with experts, linear layers and routers whose LoRA it
            holds.
        folded (`int`): routers in `router.safetensors`.
        dropped (`int`): routers whose LoRA was left out.
    """

    rank: int
    experts: int
    linears: int
    routers: int
    folded: int
    dropped: int


START = {
    "vllm-3d": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules ordmoe=THIS_FOLDER",
    "vllm-2d": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules ordmoe=THIS_FOLDER",
    "sglang": "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
    "--lora-paths ordmoe=THIS_FOLDER",
}
SERVED = """
```bash
{start}
```

No server has run with this file. Its names and shapes are those that the server's sources read. So before it serves,
compare what it answers to a few prompts with what the adapter answers in PEFT.
"""
PLAIN = """
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

PEFT read it on the base's configuration when it was written. It has no tiers, and nothing here tells another base from
its own: the adapter that it was made from has both.
"""
FOLDED = """
`router.safetensors` holds the base's routers with the adapter's update added, under the names that the base's own files
have. `PATCHED_BASE` is a copy of the base with them: put the file beside the copy's weights, and in its
`model.safetensors.index.json` (a base in one file needs one) let these names point to `router.safetensors`. Without
that the experts' LoRA runs on routing that it was not trained with.
"""
FOR_DENSE = """
The base has to be dense: PEFT computes LoRA on the weights of 4-bit linear layers, which this one has, wrong.
"""
DROPPED = """
The adapter's update of the routers is left out: routing is the base's, with which the experts' LoRA was not trained.
"""


def plain_card(base: str | None, settings: Mapping[str, Any], is_for_dense: bool) -> ModelCard:
    """The card of an adapter of `base` as plain LoRA.

    Args:
        base (`str`, *optional*): folder or hub id.
        settings (`dict`): its `adapter_config.json`.
        is_for_dense (`bool`): whether PEFT computes it right on a dense base alone.
    """
    on = [*settings["target_modules"], *settings["target_parameters"]]
    rows = {
        "LoRA": f"rank {settings['r']}, alpha {settings['lora_alpha']}, on {len(on)} weights, such as `{min(on)}`",
    }
    return _card(base, "as plain LoRA", [], rows, PLAIN + (FOR_DENSE if is_for_dense else ""))


def serving_card(base: str | None, to: str, source: str, summary: ServingExport) -> ModelCard:
    """The card of an adapter of `base` in the form `to`: what it is, how to start a server, and what was not tried."""
    served = "PATCHED_BASE" if summary.folded else _shown(base) or "BASE"
    routers = FOLDED if summary.folded else DROPPED if summary.dropped else ""
    rows = {
        "LoRA": f"rank {summary.rank} and alpha the same: scalings are in `lora_B`",
        "on": f"experts of {summary.experts} layers, {summary.linears} linear layers, {summary.routers} routers",
        "source of the form": source,
    }
    text = SERVED.format(start=START[to].format(base=served, rank=summary.rank)) + routers
    return _card(base, f"for {to}", [to], rows, text)


def _card(base: str | None, form: str, tags: list[str], rows: Mapping[str, str], text: str) -> ModelCard:
    """A card: what it is of and in which form, a table of `rows`, and `text`."""
    base = _shown(base)
    data = ModelCardData(base_model=base, library_name="peft", tags=["ordmoe", "lora", *tags])
    rows = {"written by": f"ordmoe-peft {version('ordmoe-peft')}", **rows}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    title = f"# An OrdMoE adapter of {base or 'its base'} {form}"
    return ModelCard(f"---\n{data}\n---\n\n{title}\n\n| | |\n| --- | --- |\n{table}\n{text}")


def _shown(base: str | None) -> str | None:
    """How a base is called in public: of a path of this machine its last folder."""
    return (Path(base).name if Path(base).is_absolute() else base) if base else None
