"""What the adapter and the tiers cost in a forward without gradients, against the base before any adapter.

    python -m examples.benchmarks.expert_inference --shapes wide --dtypes bfloat16

One forward of 1 token (a decoding step without its cache), of 16 and of 512 tokens, by turns: the base on transformers'
`grouped_mm`, which is what it runs on before an adapter is attached; the adapter on; disabled; and on, held to tier 3
of 3 and to tier 1, which is the model as it is. Switching these on and off is not timed, nor is PEFT's own forward
around the model, which its `generate` does not enter for each token.
"""

import copy
import itertools
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import HfArgumentParser

from ordmoe_peft import tier_routing
from ordmoe_peft.cli.tables import print_table

from .measuring import by_turns, in_own_process, print_cpu
from .subjects import DTYPES, SHAPES, build_base, variant


@dataclass
class Options:
    """What to compare."""

    shapes: list[str] = field(default_factory=lambda: ["small", "wide"])
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))
    tokens: list[int] = field(default_factory=lambda: [1, 16, 512])
    repetitions: int = field(default=21, metadata={"help": "Timed forwards of each."})


def main() -> None:
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    print_cpu()
    for shape, dtype in itertools.product(options.shapes, options.dtypes):
        times = in_own_process(time_forwards, shape, dtype, options.tokens, options.repetitions)
        rows = []
        for name in times[options.tokens[0]]:
            cells = [times[tokens][name] for tokens in options.tokens]
            firsts = [next(iter(times[tokens].values())) for tokens in options.tokens]
            ratios = [f"{cell.over(first):.2f}" for cell, first in zip(cells, firsts, strict=True)]
            rows.append([name, *itertools.chain(*zip(map(str, cells), ratios, strict=True))])
        columns = itertools.chain(*((f"{tokens} tokens", "/ base") for tokens in options.tokens))
        print_table(f"\n{shape}, {dtype}: median [min, max] of a forward", ["", *columns], rows)


def time_forwards(shape_name: str, dtype_name: str, lengths: list[int], repetitions: int) -> dict:
    """Times by number of tokens, then by what runs."""
    untouched = build_base(SHAPES[shape_name], DTYPES[dtype_name], False, "cpu").eval()
    untouched.set_experts_implementation("grouped_mm")
    shared = {id(tensor): tensor for tensor in (*untouched.parameters(), *untouched.buffers())}
    base = copy.deepcopy(untouched, memo=shared)
    adapted = variant(base, "ours").eval()
    times = {}
    for length in lengths:
        ids = torch.randint(untouched.config.vocab_size, (1, length))
        with torch.inference_mode():
            functions, contexts = forwards(untouched, adapted, ids)
            times[length] = by_turns(functions, repetitions, inside=contexts)
    return times


def forwards(untouched: nn.Module, adapted: nn.Module, ids: torch.Tensor) -> tuple[dict, dict]:
    """What to run, and in which context: one that a user enters once for many forwards."""
    contexts = {
        "base": nullcontext,
        "adapter on": nullcontext,
        "adapter disabled": adapted.disable_adapter,
        "adapter on, tier 1": partial(tier_routing, adapted, 1, num_tiers=3),
        "adapter on, tier 3": partial(tier_routing, adapted, 3, num_tiers=3),
    }
    models = {name: untouched if name == "base" else adapted.get_base_model() for name in contexts}
    functions = {name: partial(model, input_ids=ids, use_cache=False) for name, model in models.items()}
    return functions, contexts


if __name__ == "__main__":
    main()
