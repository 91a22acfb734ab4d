"""Kill training runs with SIGKILL at random moments, resume them, and compare every loss with a run left alone.

    python -m examples.benchmarks.kill_and_resume --kills 20

A small Qwen3-MoE, made on the spot, trains with random grouping: in turn on responses that its tiers sample themselves
to prompts which they share, on such responses in rows of their own, and on those of the data. Half of the kills come at
any moment, half while a checkpoint is written or an old one deleted. Each killed run goes on with
`resume_from_checkpoint="auto"`. Prints a table, and fails unless all logged figures and the final weights are the same
bits. About three minutes on two CPU cores.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.cli.tables import print_table
from ordmoe_peft.training.checkpoints import is_complete, last_checkpoint


STEPS, SAVE_EVERY, VOCABULARY = 12, 2, 64
# Name → whose responses are ranked, and the tokens that tiers route: prompts are shared where these are the response's.
SETTINGS = {
    "generated, shared": ("generated", "response"),
    "generated": ("generated", "sequence"),
    "reference": ("reference", "sequence"),
}
# TRL counts tokens from where a run was resumed (1.16).
NOT_COMPARED = ("num_tokens",)
# A server that has imported all this: what is forked from it begins to train at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["examples.benchmarks.kill_and_resume"])


class LogFile(TrainerCallback):
    """Appends each log to a file as it comes, so that a kill loses none."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # the last log, of the whole run and its time
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", *(f"w{index}" for index in range(VOCABULARY - 2))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def build_dataset() -> Dataset:
    """Prompts of two to five words, each answered by its last word twice."""
    draw = random.Random(0)
    prompts = [[f"w{draw.randrange(VOCABULARY - 2)}" for _ in range(draw.randint(2, 5))] for _ in range(40)]
    return Dataset.from_dict(
        {"prompt": [" ".join(words) for words in prompts], "completion": [f" {words[-1]}" * 2 for words in prompts]}
    )


def build_model(token_scope: str) -> torch.nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return get_peft_model(Qwen3MoeForCausalLM(config), OrdMoEConfig(r=4, grouping="random", token_scope=token_scope))


def train(folder: Path, setting: str, log_name: str) -> None:
    """Train to the end, from the last complete checkpoint in `folder` if there is one."""
    responses, token_scope = SETTINGS[setting]
    torch.set_num_threads(1)
    with (folder / "output.txt").open("a") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    trainer = OrdMoETrainer(
        build_model(token_scope),
        args=OrdMoETrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            erl_coef=0.1,
            responses=responses,
            max_completion_length=6,
            log_tiers_every=0 if responses == "generated" else 2,
            logging_steps=1,
            save_steps=SAVE_EVERY,
            save_total_limit=2,
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=build_dataset(),
        processing_class=build_tokenizer(),
        callbacks=[LogFile(folder / log_name)],
    )
    trainer.train(resume_from_checkpoint="auto")
    torch.save({name: p.data for name, p in trainer.model.named_parameters() if p.requires_grad}, folder / "weights.pt")


def start(folder: Path, setting: str, log_name: str) -> multiprocessing.Process:
    folder.mkdir(parents=True, exist_ok=True)
    process = CONTEXT.Process(target=train, args=(folder, setting, log_name))
    process.start()
    return process


def finish(folder: Path, setting: str, log_name: str) -> float:
    """Run to the end. Returns the seconds that it took."""
    began = time.monotonic()
    process = start(folder, setting, log_name)
    process.join()
    if process.exitcode != 0:
        output = (folder / "output.txt").read_text()
        raise RuntimeError(f"The run in {folder} failed with exit code {process.exitcode}:\n{output}")
    return time.monotonic() - began


def logged(folder: Path, log_name: str) -> Iterator[tuple[int, dict]]:
    """Step and figures of each log; a line that the kill cut off is left out."""
    path = folder / log_name
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            logs = json.loads(line)
            yield logs.pop("step"), {name: value for name, value in logs.items() if name not in NOT_COMPARED}


@dataclass
class Kill:
    """What a killed run was like, and whether it went on as if nothing had been."""

    setting: str
    seconds: float
    steps: int
    moment: str
    resumed_from: str
    compared: int
    differing: int
    same_weights: bool


def incomplete_steps(folder: Path) -> list[int]:
    """The steps of checkpoints that are being written or deleted."""
    checkpoints = folder.glob("checkpoint-*")
    return sorted(int(path.name.rpartition("-")[2]) for path in checkpoints if not is_complete(path))


def wait_for_checkpoint(folder: Path, number: int, process: multiprocessing.Process) -> None:
    """Until the run has begun to write a checkpoint, or delete one, for the `number`th time."""
    for _ in range(number):
        for is_there in (False, True):
            while bool(incomplete_steps(folder)) != is_there and process.is_alive():
                time.sleep(1e-4)


def kill_one(folder: Path, setting: str, alone: Path, seconds: float, draw: random.Random, at_checkpoint: bool) -> Kill:
    """Train in `folder`, kill, resume, and compare with the run in `alone`, which took `seconds`."""
    began = time.monotonic()
    process = start(folder, setting, "killed.jsonl")
    if at_checkpoint:
        wait_for_checkpoint(folder, draw.randint(1, 8), process)
        time.sleep(draw.uniform(0, 0.03))
    else:
        time.sleep(draw.uniform(0, seconds))
    was_running = process.is_alive()
    process.kill()
    process.join()
    lived = time.monotonic() - began
    left = incomplete_steps(folder)
    steps = max((step for step, _ in logged(folder, "killed.jsonl")), default=0)
    last = last_checkpoint(folder)
    finish(folder, setting, "resumed.jsonl")
    wanted = dict(logged(alone, "alone.jsonl"))
    pairs = [(wanted[step], logs) for name in ("killed", "resumed") for step, logs in logged(folder, f"{name}.jsonl")]
    weights, wanted_weights = torch.load(folder / "weights.pt"), torch.load(alone / "weights.pt")
    return Kill(
        setting=setting,
        seconds=lived,
        steps=steps,
        moment=_moment(left, steps, was_running),
        resumed_from=Path(last).name if last else "the start",
        compared=len(pairs),
        differing=sum(one != other for one, other in pairs),
        same_weights=all(torch.equal(weights[name], wanted_weights[name]) for name in wanted_weights),
    )


def _moment(left: list[int], steps: int, was_running: bool) -> str:
    """What the kill cut off, of a run that left checkpoints of the steps `left` incomplete."""
    if left:
        return f"{'writing' if left[-1] >= steps else 'deleting'} checkpoint-{left[-1]}"
    return "between" if was_running else "after the end"


def run(folder: Path, kills: int, seed: int = 0) -> list[Kill]:
    """Let one run of each kind alone, and kill `kills` others."""
    draw = random.Random(seed)
    alone = {setting: folder / f"alone-{setting}" for setting in list(SETTINGS)[:kills]}
    # The first run also waits for the server that it is forked from.
    finish(folder / "warm", next(iter(SETTINGS)), "warm.jsonl")
    seconds = {setting: finish(path, setting, "alone.jsonl") for setting, path in alone.items()}
    results = []
    for index in range(kills):
        setting, at_checkpoint = list(SETTINGS)[index % 3], index % 2 == 1
        results.append(
            kill_one(folder / f"run-{index}", setting, alone[setting], seconds[setting], draw, at_checkpoint)
        )
        print(f"kill {index + 1} of {kills}: {results[-1]}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), options.kills, options.seed)
    print_table(
        f"{len(results)} runs of {STEPS} steps, a checkpoint every {SAVE_EVERY}, killed and resumed",
        ("run", "killed after", "step", "moment", "resumed from", "logs compared", "differing", "weights"),
        [
            (
                kill.setting,
                f"{kill.seconds:.2f} s",
                str(kill.steps),
                kill.moment,
                kill.resumed_from,
                str(kill.compared),
                str(kill.differing),
                "same" if kill.same_weights else "DIFFER",
            )
            for kill in results
        ],
    )
    failed = [kill for kill in results if kill.differing or not kill.same_weights]
    print(f"{len(results) - len(failed)} of {len(results)} runs went on to the same bits.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
