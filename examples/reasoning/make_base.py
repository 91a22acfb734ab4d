"""Train the base of this example on the spot: a small Qwen3-MoE, from scratch, on questions of reasoning-gym.

TRL's `SFTTrainer` trains until held-out validation questions show the accuracy in `STOP_AT`, so that fine-tuning has
room: 500 steps, about two minutes of one CPU core.

    python -m examples.reasoning.make_base --output_dir outputs/reasoning/base

`AutoModelForCausalLM` and `AutoTokenizer` load the folder; `training_record.json` says how it came about.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from examples.reasoning.data import load_reasoning
from ordmoe_peft.tools.measure.evaluation import OVERALL, evaluate_tiers


STOP_AT = 0.55
MOST_STEPS = 1500
# The longest answer is a word of ten letters, then its end.
MAX_ANSWER = 11
PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
SPEAKERS = {"user": "<|user|>", "assistant": "<|assistant|>"}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def common_beginning(texts: list[str]) -> str:
    """The characters that all `texts` begin with: what the first and the last in alphabetical order share."""
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_phrases(questions: list[str]) -> set[str]:
    """The text that all of `questions` begin with, and the text that all end with."""
    ending = common_beginning([question[::-1] for question in questions])[::-1]
    return {common_beginning(questions), ending} - {""}


def build_tokenizer(train: Dataset) -> PreTrainedTokenizerFast:
    """A tokenizer of characters, and of the phrases around the problems, one token each.

    So a question takes about fifteen tokens, and the digits of a number and the letters of a word stay apart.
    """
    questions = defaultdict(list)
    for kind, prompt in zip(train["kind"], train["prompt"], strict=True):
        questions[kind].append(prompt[0]["content"])
    phrases = sorted(set().union(*map(common_phrases, questions.values())))
    characters = [chr(code) for code in range(ord(" "), ord("~") + 1)]
    pieces = [PAD, END, UNKNOWN, *SPEAKERS.values(), *characters, *phrases]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, phrases), r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={f"{role}_token": token for role, token in SPEAKERS.items()},
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Qwen3-30B-A3B's architecture with 1.8 million weights: 4 layers of 16 experts, 2 active."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        # About 1/√hidden: at the default 0.02, the products that compare two tokens start too small to be found.
        initializer_range=0.08,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def accuracy_by_kind(model, tokenizer, split: Dataset) -> dict[str, float]:
    """Exact match of greedily generated answers, per kind and overall."""
    # Left on for the balance loss, router logits break transformers' cached decoding (5.23).
    wants_logits, model.config.output_router_logits = model.config.output_router_logits, False
    result = evaluate_tiers(model, tokenizer, split, group_by="kind", batch_size=250, max_new_tokens=MAX_ANSWER)[0]
    model.config.output_router_logits = wants_logits
    return result.accuracy


class StopAt(TrainerCallback):
    """Ends training once 300 validation questions reach an accuracy."""

    def __init__(self, least: float, tokenizer, validation: Dataset, every: int = 100):
        self.least, self.tokenizer, self.every = least, tokenizer, every
        self.sample = validation.shuffle(seed=0).select(range(min(300, len(validation))))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        accuracy = accuracy_by_kind(model, self.tokenizer, self.sample)
        print(f"step {state.global_step}: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()), flush=True)
        control.should_training_stop = accuracy[OVERALL] >= self.least


def train(model, tokenizer, splits: DatasetDict, work: str, most_steps: int, seed: int) -> int:
    """Train in place and return the number of steps."""
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            work,
            max_steps=most_steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=100,
            weight_decay=0.05,
            router_aux_loss_coef=0.01,
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=splits["train"].remove_columns(["kind", "seed"]),
        processing_class=tokenizer,
        callbacks=[StopAt(STOP_AT, tokenizer, splits["validation"])],
    )
    trainer.train()
    return trainer.state.global_step


def make_base(splits: DatasetDict, output: Path, most_steps: int, seed: int = 0) -> dict:
    """Build, train and save the base in `output`; returns its training record."""
    started = time.perf_counter()
    set_seed(seed)
    tokenizer = build_tokenizer(splits["train"])
    model = build_model(tokenizer)
    model.set_experts_implementation("ordmoe")
    with TemporaryDirectory() as work:
        steps = train(model, tokenizer, splits, work, most_steps, seed)
    seconds = round(time.perf_counter() - started)
    model.config.output_router_logits = False
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {
        "script": "examples/reasoning/make_base.py",
        "seed": seed,
        "steps": steps,
        "stop_at": STOP_AT,
        "seconds": seconds,
        "parameters": model.num_parameters(),
        "validation_accuracy": accuracy_by_kind(model, tokenizer, splits["validation"]),
    }
    (output / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reasoning/base"))
    parser.add_argument("--most-steps", type=int, default=MOST_STEPS, help="upper bound; see STOP_AT")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(make_base(load_reasoning(), args.output_dir, args.most_steps, args.seed), indent=2))


if __name__ == "__main__":
    main()
