"""Kill saves of an adapter over another with SIGKILL at random moments, and exports over another, and see what is left.

    python -m examples.benchmarks.kill_while_saving --kills 200

Two adapters of a small Qwen3-MoE, of other ranks, are saved over each other in one folder (beside a trainer's files),
and exported over each other in another. After each kill the folder is loaded: it has to be the older or the newer one,
whole. Prints a table, and fails otherwise. About two minutes on two CPU cores.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.cli.tables import print_table
from ordmoe_peft.tools.export.plain_peft import export_plain_lora


RANKS = (4, 8)
# A server that has imported all this: what is forked from it begins to save at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["examples.benchmarks.kill_while_saving"])


def base() -> Qwen3MoeForCausalLM:
    """The base, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(num_experts=16, num_experts_per_tok=2, max_position_embeddings=64, **sizes, **heads)
    return Qwen3MoeForCausalLM(config).eval()


def adapted(rank: int) -> PeftModel:
    """The base with the adapter of a rank."""
    model = get_peft_model(base(), OrdMoEConfig(r=rank, lora_alpha=rank))
    torch.manual_seed(rank)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


@torch.no_grad()
def answer(model: torch.nn.Module) -> torch.Tensor:
    """What an adapter is known by."""
    return model(torch.arange(1, 33)[None]).logits


def save(rank: int, folder: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    model = adapted(rank)
    ready.send(True)
    model.save_pretrained(folder)


def export(rank: int, folder: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    ready.send(True)
    export_plain_lora(folder.with_name(f"rank-{rank}"), folder)


def kill_one(write, rank: int, folder: Path, longest: float) -> float | None:
    """Let a process write, and kill it at a random moment. Returns the seconds that it took where it had finished."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=write, args=(rank, folder, there))
    process.start()
    here.recv()
    started = time.perf_counter()
    process.join(random.uniform(0, longest))
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return None
    assert process.exitcode == 0, "it failed by itself"
    return time.perf_counter() - started


def run(folder: Path, kills: int) -> dict[str, Counter]:
    """Kill `kills` saves and as many exports. Returns what was left of each: `older`, `newer` or `neither`."""
    random.seed(0)
    torch.set_num_threads(1)
    expected = {}
    for rank in RANKS:
        model = adapted(rank)
        expected[rank] = answer(model)
        model.save_pretrained(folder / f"rank-{rank}")
    left = {}
    for name, write in (("save", save), ("export", export)):
        target = folder / name
        _, there = CONTEXT.Pipe()
        write(RANKS[0], target, there)
        if name == "save":
            (target / "trainer_state.json").write_text("{}")
        started = time.perf_counter()
        write(RANKS[0], target, there)
        longest, current, counts = time.perf_counter() - started, RANKS[0], Counter()
        while sum(counts.values()) < kills:
            rank = next(rank for rank in RANKS if rank != current)
            if kill_one(write, rank, target, longest) is not None:
                current = rank
                continue
            logits = answer(PeftModel.from_pretrained(base(), target).eval())
            found = [rank for rank in RANKS if torch.allclose(logits, expected[rank], atol=1e-5)]
            outcome = "neither" if not found else "older" if found[0] == current else "newer"
            counts[outcome] += 1
            current = found[0] if found else current
        left[name] = counts
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of saves, and as many of exports")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        left = run(Path(folder), args.kills)
    outcomes = ("older", "newer", "neither")
    rows = [(name, *(str(counts[outcome]) for outcome in outcomes)) for name, counts in left.items()]
    print_table(f"What {args.kills} kills of each left in the folder", ("killed", *outcomes), rows)
    sys.exit(any(counts["neither"] for counts in left.values()))


if __name__ == "__main__":
    main()
