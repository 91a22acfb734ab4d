"""What the processes of distributed tests run. Imported once, by the server that they are forked from."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.cli.main import main
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.config import MoeBitsAndBytesConfig
from tests import models, text


SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "erl_coef": 0.1,
    "balance_coef": 0.01,
    "log_tiers_every": 2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def tiny_trainer(
    folder: str | Path,
    adapter: dict | None = None,
    dataset: Dataset | None = None,
    evaluated: Dataset | None = None,
    base: torch.nn.Module | None = None,
    sharded: bool = False,
    **settings: Any,
) -> OrdMoETrainer:
    """A trainer of a tiny Qwen3-MoE, or of `base`, on the CPU; `sharded` as accelerate's environment says."""
    args = OrdMoETrainingArguments(str(folder), **(SETTINGS | settings))
    if sharded and args.world_size > 1:
        # accelerate 1.15 takes a CPU run for DDP whatever its environment says; all else is as on GPUs.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    model = get_peft_model(models.qwen3_moe() if base is None else base, OrdMoEConfig(**({"r": 4} | (adapter or {}))))
    models.randomize_adapter(model)
    return OrdMoETrainer(
        model,
        args=args,
        train_dataset=text.conversations(16) if dataset is None else dataset,
        eval_dataset=evaluated,
        processing_class=text.tokenizer(),
    )


def packed_base(quant_storage: str, folder: str | Path) -> torch.nn.Module:
    """A tiny Qwen3-MoE with its experts in 4 bits, their bytes presented as `quant_storage`."""
    models.qwen3_moe(moe_intermediate_size=32).save_pretrained(folder)
    config = MoeBitsAndBytesConfig(bnb_4bit_quant_storage=quant_storage, bnb_4bit_compute_dtype="float32")
    return type(models.qwen3_moe()).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def result_of(trainer: OrdMoETrainer) -> dict[str, Any]:
    """The logs of the steps, and the trained weights, whole."""
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "logs": [entry for entry in trainer.state.log_history if "learning_rate" in entry],
        "weights": {
            name.replace("._checkpoint_wrapped_module", ""): getattr(p, "full_tensor", p.clone)().clone()
            for name, p in weights.items()
        },
    }


def train(folder: str, settings: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """Train with `settings`."""
    trainer = tiny_trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return result_of(trainer)


def make_uneven(trainer: OrdMoETrainer, empty: int | None = None) -> None:
    """Take the responses from the second process's batches, and from batch `empty` of the first; and have the first
    process need separate rows in the first and in the fourth step.
    """
    is_first, batches = trainer.accelerator.process_index == 0, []
    collate, join = trainer.data_collator, trainer._sharing.join

    def without_responses(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        batches.append(batch)
        if not is_first or len(batches) == empty:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    trainer.data_collator = without_responses
    trainer._sharing.join = lambda *args: None if is_first and trainer.state.global_step in (0, 3) else join(*args)


def verdict_of(trainer: OrdMoETrainer) -> tuple[bool, bool]:
    """Whether this process has judged that prompts can be shared, and how."""
    return trainer._sharing.is_judged, trainer._sharing.is_possible


def train_unevenly(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train where processes differ in what their batches have, and in the second step none has a response."""
    trainer = tiny_trainer(folder, **settings)
    make_uneven(trainer, empty=2)
    trainer.train()
    return result_of(trainer) | {"verdict": verdict_of(trainer)}


class CountSaves(TrainerCallback):
    """Counts checkpoints that are complete when the trainer says so."""

    def __init__(self):
        self.complete = 0

    def on_save(self, args, state, control, **kwargs):
        self.complete += Path(args.output_dir, f"checkpoint-{state.global_step}", "trainer_state.json").is_file()


def train_from_the_last(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Go on from the last checkpoint in `folder`, which the second process does not look into."""
    own = folder if PartialState(cpu=True).is_main_process else f"{folder}-other"
    return train(own, settings, "auto")


def train_and_save(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, saving; and how many checkpoints this process saw complete."""
    trainer = tiny_trainer(folder, save_strategy="steps", save_steps=2, **settings)
    saves = CountSaves()
    trainer.add_callback(saves)
    trainer.train()
    return result_of(trainer) | {"saves": saves.complete}


def train_sharded(folder: str, settings: dict[str, Any], quant_storage: str | None = None) -> dict[str, Any]:
    """Train under FSDP2 where there are several processes; and what becomes of the expert stacks."""
    base = packed_base(quant_storage, f"{folder}-base-{os.getpid()}") if quant_storage else None
    trainer = tiny_trainer(folder, base=base, sharded=True, **settings)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts these to bfloat16 where experts are in 4 bits
            parameter.data = parameter.data.float()
    trainer.train()
    stack = MoEModel.of(trainer.model).layers[0].experts.gate_up_proj
    return result_of(trainer) | {"stack": (type(stack.data).__name__, stack.dtype)}


def sharded_and_resumed(folder: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train unevenly under FSDP2, saving, and once more from the checkpoint half way."""
    results = []
    for resume, saving in ((None, {"save_strategy": "steps", "save_steps": 2}), (f"{folder}/checkpoint-2", {})):
        trainer = tiny_trainer(folder, sharded=True, **settings, **saving)
        make_uneven(trainer)
        trainer.train(resume_from_checkpoint=resume)
        results.append(result_of(trainer) | {"verdict": verdict_of(trainer)})
    return results


def refusal(folder: str, settings: dict[str, Any]) -> str:
    """What the trainer says to `settings` under FSDP."""
    try:
        tiny_trainer(folder, sharded=True, **settings)
    except OrdMoEConfigError as error:
        return str(error)
    return "nothing"


def command(arguments: list[str]) -> int:
    """`ordmoe` with these arguments."""
    return main(arguments)
