"""What a change that claims to change nothing must leave equal to the bit.

    python -m tests.same_bits before.json        # at the old code
    python -m tests.same_bits after.json --than before.json        # at the new code; names each difference

Losses, gradients (through the optimizer into the adapter's bytes), logits under tiers, generated tokens, merged
weights, merged files and the plan of a model's memory, of fixed seeds, on text, images and NF4, with tiers batched,
one after another and on shared prompts. It takes 2 to 3 minutes on two cores. Figures depend on CPU and libraries:
compare runs of one machine and environment.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.easy_vqa.data import load_easy_vqa, write_parquet
from ordmoe import main as command
from ordmoe_peft import (
    MoeBitsAndBytesConfig,
    OrdMoEConfig,
    OrdMoETrainer,
    OrdMoETrainingArguments,
    quantize_experts_,
    tier_routing,
)
from tests import models, text
from tests.training.test_trainer import SETTINGS


BASE = "examples/easy_vqa/base"
FAMILIES = {**models.FAMILIES, "gpt_oss": models.gpt_oss, "deepseek_v3": models.deepseek_v3}
TRAINING = SETTINGS | {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "log_router_health": True,
    "log_tiers_every": 2,
}
# Name → (in 4 bits, adapter's settings, training's settings).
TEXT_RUNS = {
    "batched": (False, {}, {"tier_passes": "batched", "gradient_checkpointing": True}),
    "sequential": (False, {}, {"tier_passes": "sequential"}),
    "shared": (False, {"token_scope": "response"}, {"share_prompt": True}),
    "nf4": (True, {}, {"tier_passes": "batched"}),
    "nf4-sequential": (True, {"targets": ["router", "experts", "attention"]}, {"tier_passes": "sequential"}),
    "dpo": (False, {}, {"objective": "dpo", "tier_passes": "sequential"}),
    "floor": (False, {}, {"lower_tier_floor": "uniform", "balance_coef": 0.1}),
    "random-match": (False, {"grouping": "random", "tier_weights": "match"}, {}),
    "one-tier": (False, {"num_tiers": 1}, {}),
    "generated": (
        False,
        {},
        {"responses": "generated", "generation_kwargs": {"max_new_tokens": 4}, "tier_passes": "sequential"},
    ),
}
IMAGE_RUNS = {
    "images-batched": (False, {}, {"tier_passes": "batched"}),
    "images-sequential-nf4": (True, {}, {"tier_passes": "sequential"}),
    "images-shared": (False, {"token_scope": "response"}, {"share_prompt": True}),
}
NOT_COMPARED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch")


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def of_training(name: str, model, settings: dict, folder: Path, **data) -> Iterator[tuple[str, object]]:
    args = OrdMoETrainingArguments(str(folder / name), **(TRAINING | settings))
    trainer = OrdMoETrainer(model, args=args, **data)
    trainer.train()
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key not in NOT_COMPARED and not key.startswith("train_"):
                yield f"{name}/step {entry['step']}/{key}", value
    trained = {key: weight for key, weight in trainer.model.named_parameters() if weight.requires_grad}
    yield f"{name}/trained weights", digest(trained)
    trainer.save_model(str(folder / name / "adapter"))
    yield (
        f"{name}/adapter file",
        hashlib.sha256((folder / name / "adapter/adapter_model.safetensors").read_bytes()).hexdigest(),
    )


def text_training(folder: Path) -> Iterator[tuple[str, object]]:
    for name, (in_4_bits, adapter, settings) in TEXT_RUNS.items():
        model = models.qwen3_moe()
        if in_4_bits:
            quantize_experts_(model)
        torch.manual_seed(0)
        model = get_peft_model(model, OrdMoEConfig(**({"r": 4} | adapter)))
        models.randomize_adapter(model)
        data = {"train_dataset": text.conversations(32), "processing_class": text.tokenizer()}
        yield from of_training(name, model, settings, folder, **data)


def image_training(folder: Path) -> Iterator[tuple[str, object]]:
    samples = load_easy_vqa()["train"].select(range(0, 320, 10))
    for name, (in_4_bits, adapter, settings) in IMAGE_RUNS.items():
        config = MoeBitsAndBytesConfig() if in_4_bits else None
        base = AutoModelForImageTextToText.from_pretrained(BASE, quantization_config=config)
        torch.manual_seed(0)
        model = get_peft_model(base, OrdMoEConfig(**({"r": 4} | adapter)))
        data = {"train_dataset": samples, "processing_class": AutoProcessor.from_pretrained(BASE)}
        yield from of_training(name, model, {"max_length": None} | settings, folder, **data)


def inference(_: Path) -> Iterator[tuple[str, object]]:
    for family, build in FAMILIES.items():
        batch = models.batch_for(family)
        for in_4_bits in (False, True):
            model = build()
            if in_4_bits:
                quantize_experts_(model)
            model = get_peft_model(model, OrdMoEConfig(r=4, targets=["router", "experts", "attention"])).eval()
            models.randomize_adapter(model)
            name = f"{family}{' 4 bits' if in_4_bits else ''}"
            with torch.no_grad():
                for tier in (1, 2, 3):
                    with tier_routing(model, tier):
                        yield f"{name}/logits of tier {tier}", digest({"logits": model(**batch).logits})
                with tier_routing(model, 2):
                    written = model.generate(**batch, max_new_tokens=4, do_sample=False)
                yield f"{name}/generated", written.tolist()
                merged = model.merge_and_unload()
                yield f"{name}/merged weights", digest(dict(merged.state_dict()))


def on_disk(folder: Path) -> Iterator[tuple[str, object]]:
    for family in ("qwen3_moe", "gpt_oss"):
        base, adapter = folder / family, folder / f"{family}-adapter"
        FAMILIES[family]().save_pretrained(base, max_shard_size="100KB")
        text.tokenizer().save_pretrained(base)
        model = get_peft_model(type(FAMILIES[family]()).from_pretrained(base), OrdMoEConfig(r=4))
        models.randomize_adapter(model)
        model.save_pretrained(adapter)
        for options in ([], ["--load_in_4bit"]):
            output = folder / f"{family}-merged{len(options)}"
            assert command(["merge", str(adapter), "--output_dir", str(output), *options]) == 0
            files = b"".join(file.read_bytes() for file in sorted(output.glob("*.safetensors")))
            yield f"{family}{' 4 bits' if options else ''}/merged files", hashlib.sha256(files).hexdigest()


def commands(folder: Path) -> Iterator[tuple[str, object]]:
    write_parquet(load_easy_vqa(), folder / "data")
    data = ["--dataset_name", str(folder / "data"), "--limit", "16"]
    calls = {
        "plan": ["plan", BASE, "--gpu_memory_gb", "8", "--load_in_4bit"],
        "tiers": ["tiers", BASE, *data, "--max_new_tokens", "2"],
        "inspect": ["inspect", BASE, *data],
        "evaluate": ["evaluate", BASE, *data, "--max_new_tokens", "2"],
    }
    for name, arguments in calls.items():
        output = folder / f"{name}.json"
        assert command([*arguments, "--output_file", str(output)]) == 0
        yield f"{name}/results", json.loads(output.read_text())


def all_figures(only: str | None) -> dict[str, object]:
    parts = (text_training, image_training, inference, on_disk, commands)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if only is None or part.__name__ == only:
                with redirect_stdout(StringIO()):
                    figures |= part(Path(folder))
    return json.loads(json.dumps(figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--than", type=Path, help="figures to compare with")
    parser.add_argument("--only", help="one part: text_training, image_training, inference, on_disk or commands")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = all_figures(args.only)
    args.output.write_text(json.dumps(figures, indent=1))
    print(f"{len(figures)} figures")
    if args.than is None:
        return 0
    before = json.loads(args.than.read_text())
    differing = [name for name in figures if figures[name] != before.get(name)]
    for name in differing:
        print(f"{name}: {before.get(name)} -> {figures[name]}"[:300])
    print(f"{len(differing)} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
