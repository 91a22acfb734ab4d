"""What a training step of OrdMoE costs beside supervised fine-tuning and DPO: time, memory and FLOPs.

    python -m examples.benchmarks.tier_passes

One model, one adapter, one batch, real trainers. Times are medians over rounds in which the trainers take turns; peak
memory is that of a fresh process for each trainer, over what the loaded model holds; FLOPs are counted, not estimated.
DPO gets the same prompts and responses as pairs of the same lengths, with its adapter switched off as the reference.
Then `generate`, plain and held to a tier: on the same model, and on one with layers as large as a real model's, where
the few steps that hold a router to its tier weigh what they weigh in use.
"""

import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments, tier_routing
from ordmoe_peft.cli.tables import print_table

from .measuring import by_turns, grouped_mm_flops, in_a_fresh_process, peak_of, print_cpu
from .trainers import Clock


@dataclass
class Options:
    """Sizes of the model and of a batch."""

    hidden_size: int = field(default=512, metadata={"help": "Hidden size H."})
    layers: int = field(default=4, metadata={"help": "Decoder layers."})
    experts: int = field(default=32, metadata={"help": "Experts per layer, E."})
    top_k: int = field(default=4, metadata={"help": "Experts per token, K."})
    expert_width: int = field(default=256, metadata={"help": "Expert width F."})
    vocabulary: int = field(default=8192, metadata={"help": "Vocabulary."})
    batch_size: int = field(default=4, metadata={"help": "Samples in a batch."})
    tokens: int = field(default=320, metadata={"help": "Prompt and response of a sample together."})
    steps: int = field(default=3, metadata={"help": "Timed steps of a trainer in a round; one more warms up."})
    rounds: int = field(default=3, metadata={"help": "Rounds in which the trainers take turns."})
    generations: int = field(default=15, metadata={"help": "Timed calls of `generate` of each kind, by turns."})
    new_tokens: int = field(default=64, metadata={"help": "Tokens that `generate` writes."})
    generate_only: bool = field(default=False, metadata={"help": "Print the tables of `generate` alone."})
    only: str | None = field(default=None, metadata={"help": "Internal: measure the memory of this row alone."})
    prompt_parts: int = field(default=4, metadata={"help": "Internal: prompt tokens for each response token."})


# Two layers as large as those of Qwen3-30B-A3B (its config.json).
REAL_LAYERS = {"hidden_size": 2048, "layers": 2, "experts": 128, "top_k": 8, "expert_width": 768, "batch_size": 1}

SFT, DPO = "SFT (C = 1)", "trl.DPOTrainer"
# Row → the adapter's and the trainer's arguments.
ORDMOE: dict[str, tuple[dict, dict]] = {
    SFT: ({"num_tiers": 1}, {"balance_coef": 0.0}),
    # TRL's head scores every position of a row on CPU, OrdMoE's passes those of the response, as TRL does on CUDA.
    "C = 1, responses alone scored": ({"num_tiers": 1}, {"balance_coef": 1e-9}),
    "C = 3, sequence scope, batched": ({}, {"tier_passes": "batched"}),
    "C = 3, sequence scope, sequential": ({}, {"tier_passes": "sequential"}),
    "C = 3, response scope, rows": ({"token_scope": "response"}, {"tier_passes": "batched", "share_prompt": False}),
    "C = 3, response scope, shared prompt": ({"token_scope": "response"}, {"tier_passes": "batched"}),
}


def words(options: Options) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, options.vocabulary)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def samples(options: Options) -> Dataset:
    """Random words; responses of the same length, chosen and rejected, each ended by the trainer's `</s>`."""
    generator = torch.Generator().manual_seed(0)
    response = options.tokens // (options.prompt_parts + 1)

    def text(length: int) -> str:
        return " ".join(f"w{index}" for index in torch.randint(2, options.vocabulary, (length,), generator=generator))

    rows = []
    for _ in range(options.batch_size):
        chosen, rejected = f" {text(response - 1)} </s>", f" {text(response - 1)} </s>"
        rows.append({"prompt": text(options.tokens - response), "completion": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def adapted(options: Options, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        moe_intermediate_size=options.expert_width,
        pad_token_id=0,
        eos_token_id=1,
    )
    return get_peft_model(Qwen3MoeForCausalLM(config), OrdMoEConfig(r=16, lora_alpha=32, **settings))


def trainer_of(name: str, options: Options, folder: str) -> Any:
    steps = {"max_steps": options.steps + 1, "per_device_train_batch_size": options.batch_size}
    shared = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    shared |= steps | {"gradient_checkpointing": False, "max_length": None, "bf16": False}
    dataset, tokenizer = samples(options), words(options)
    if name == DPO:
        pairs = dataset.rename_column("completion", "chosen")
        args = DPOConfig(folder, router_aux_loss_coef=0.0, **shared)
        model = adapted(options, num_tiers=1)
        return DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
    settings, arguments = ORDMOE[name]
    # Tiers without a part in the objective are run to be logged now and then; not in these steps.
    args = OrdMoETrainingArguments(folder, log_tiers_every=0, **shared, **arguments)
    dataset = dataset.remove_columns("rejected")
    return OrdMoETrainer(adapted(options, **settings), args, dataset, processing_class=tokenizer)


def training_step(trainer: Any, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward, as the trainer's loop takes them."""
    trainer.current_gradient_accumulation_steps = 1
    count = (batch["labels"] != -100).sum() if "labels" in batch else None
    trainer.training_step(trainer.model, dict(batch), count)


def flops(trainer: Any) -> int:
    """Of one step, forward and backward."""
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(2):  # the first may also judge whether prompts can be shared
        with FlopCounterMode(display=False, custom_mapping=grouped_mm_flops()) as counter:
            training_step(trainer, batch)
        trainer.model.zero_grad()
    return counter.get_total_flops()


def seconds_by_row(trainers: dict[str, Any], rounds: int) -> dict[str, float]:
    clocks = {name: Clock() for name in trainers}
    for name, trainer in trainers.items():
        trainer.add_callback(clocks[name])
        trainer.remove_callback(PrinterCallback)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            clocks[name].seconds.clear()
            trainer.train()
            seconds[name] += clocks[name].seconds[1:]
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory(name: str, options: Options) -> int:
    """Peak bytes of a training step, the second of two that accumulate, so that gradients exist before it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(name, options, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        step = partial(training_step, trainer, batch)
        step()
        return peak_of(step)


def cost_table(options: Options) -> None:
    response = options.tokens // (options.prompt_parts + 1)
    names = [*ORDMOE, DPO]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_of(name, options, folder) for name in names}
        counted = {name: flops(trainer) for name, trainer in trainers.items()}
        seconds = seconds_by_row(trainers, options.rounds)
    bytes_ = {
        name: in_a_fresh_process("examples.benchmarks.tier_passes", only=name, **sizes(options)) for name in names
    }
    rows = [
        [
            name,
            f"{1e3 * seconds[name]:.0f}",
            *(f"{seconds[name] / seconds[other]:.2f}" for other in (SFT, DPO)),
            f"{counted[name] / 1e9:.0f}",
            f"{counted[name] / counted[SFT]:.2f}",
            f"{bytes_[name] / 1e6:.0f}",
            f"{bytes_[name] / bytes_[SFT]:.2f}",
        ]
        for name in names
    ]
    print_table(
        f"\nA step of {options.batch_size} samples, {options.tokens - response} prompt and {response} response tokens; "
        "ratios are to SFT's step, or to DPO's",
        ["", "ms", "x SFT", "x DPO", "GFLOPs", "x SFT", "peak MB", "x SFT"],
        rows,
    )


def sizes(options: Options) -> dict[str, int]:
    others = ("only", "rounds", "generations", "new_tokens", "generate_only")
    return {name: value for name, value in vars(options).items() if name not in others}


def generation_table(options: Options) -> None:
    model = adapted(options).eval()
    # Tokens as far apart as a trained model's, and sampled: else all of them go to the same few experts, whose weights
    # stay in the processor's cache on tier 1 and not on the others.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    prompts = torch.randint(2, options.vocabulary, (options.batch_size, 64), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    arguments |= {"do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(prompts)}

    def plain() -> None:
        model.generate(prompts, **arguments)

    def held(tier: int) -> Callable[[], None]:
        def run() -> None:
            with tier_routing(model, tier=tier):
                model.generate(prompts, **arguments)

        return run

    ways = {"plain": plain} | {f"tier {tier}": held(tier) for tier in (1, 2, 3)}
    times = by_turns(ways, options.generations)
    print_table(
        f"\n`generate`: batch of {options.batch_size}, 64 tokens of prompt and {options.new_tokens} new ones, "
        f"E {options.experts}, K {options.top_k}, H {options.hidden_size}, F {options.expert_width}, "
        f"{options.layers} layers",
        ["", "median [min, max]", "x plain"],
        [[name, str(times[name]), f"{times[name].over(times['plain']):.3f}"] for name in ways],
    )


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    disable_progress_bars()
    # Of transformers' own use of its deprecated names, and of pinned memory without an accelerator.
    warnings.simplefilter("ignore")
    if options.only is not None:
        print(json.dumps(memory(options.only, options)))
        return
    print_cpu()
    if not options.generate_only:
        for options.prompt_parts in (4, 1):
            cost_table(options)
    generation_table(options)
    generation_table(replace(options, **REAL_LAYERS))


if __name__ == "__main__":
    main()
