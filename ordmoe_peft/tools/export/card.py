"""The card of an adapter that is written for a server."""

from dataclasses import dataclass
from importlib.metadata import version

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
FOLDED = """
`router.safetensors` holds the base's routers with the adapter's update added, under the names that the base's own files
have. Serve a copy of the base with them: put the file beside the copy's weights, and in its
`model.safetensors.index.json` let these names point to `router.safetensors`. Without that the experts' LoRA runs on
routing that it was not trained with.
"""
DROPPED = """
The adapter's update of the routers is left out: routing is the base's, with which the experts' LoRA was not trained.
"""


def serving_card(base: str | None, to: str, source: str, summary: ServingExport) -> ModelCard:
    """The card of an adapter of `base` in the form `to`: what it is, how to start a server, and what was not tried."""
    data = ModelCardData(base_model=base or None, library_name="peft", tags=["ordmoe", "lora", to])
    routers = FOLDED if summary.folded else DROPPED if summary.dropped else ""
    start = START[to].format(base=base or "BASE", rank=summary.rank)
    return ModelCard(f"""---
{data}
---

# An OrdMoE adapter of {base or "its base"} for {to}

| | |
| --- | --- |
| written by | ordmoe-peft {version("ordmoe-peft")} |
| LoRA | rank {summary.rank} and alpha the same: scalings are in `lora_B` |
| on | experts of {summary.experts} layers, {summary.linears} linear layers, {summary.routers} routers |
| source of the form | {source} |

```bash
{start}
```

No server has run with this file. Its names and shapes are those that the server's sources read, and read back they give
the adapter's own outputs on the base.
{routers}""")
