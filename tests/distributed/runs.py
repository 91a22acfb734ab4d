"""What the processes of distributed tests run. Imported once, by the server that they are forked from."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback, training_args

from ordmoe import main
from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.config import MoeBitsAndBytesConfig
from ordmoe_peft.training.step_guard import STATE_NAME
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


def own_base(folder: str, is_packed: bool) -> torch.nn.Module | None:
    """The base that a process trains on, with experts in 4 bits if `is_packed`, else that of [`tiny_trainer`]."""
    return packed_base("uint8", f"{folder}-base-{os.getpid()}") if is_packed else None


def result_of(trainer: OrdMoETrainer) -> dict[str, Any]:
    """The logs of the steps, and the trained weights, whole."""
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "logs": [entry for entry in trainer.state.log_history if "learning_rate" in entry],
        "weights": {name.replace("._checkpoint_wrapped_module", ""): whole(p) for name, p in weights.items()},
    }


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy of a weight that may be shared out over processes."""
    if not hasattr(parameter, "ds_shape"):
        return getattr(parameter.detach(), "full_tensor", parameter.detach().clone)().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


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


def train_and_save(folder: str, settings: dict[str, Any], is_packed: bool = False) -> dict[str, Any]:
    """Train, saving; and how many checkpoints this process saw complete."""
    trainer = tiny_trainer(folder, base=own_base(folder, is_packed), save_strategy="steps", save_steps=2, **settings)
    saves = CountSaves()
    trainer.add_callback(saves)
    trainer.train()
    return result_of(trainer) | {"saves": saves.complete}


def resume(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Go on from checkpoint 2, on experts in 4 bits."""
    trainer = tiny_trainer(folder, base=own_base(folder, is_packed=True), **settings)
    trainer.train(f"{folder}/checkpoint-2")
    return result_of(trainer)


def train_in_full_precision(folder: str, settings: dict[str, Any], is_packed: bool) -> dict[str, Any]:
    """Train the adapter in float32, on experts in 4 bits or not; and what accelerate takes the run for."""
    trainer = tiny_trainer(folder, base=own_base(folder, is_packed), **settings)
    make_full_precision(trainer)
    trainer.train()
    return result_of(trainer) | {"kind": trainer.accelerator.distributed_type.value}


class Poison(TrainerCallback):
    """Makes an output of the base NaN in the second step, its gradient in the third. Keeps the weights after each."""

    def __init__(self, trainer: OrdMoETrainer):
        self.trainer, self.weights = trainer, []
        trainer.model.get_base_model().model.layers[1].mlp.register_forward_hook(self)
        trainer.add_callback(self)

    def __call__(self, module, args, output):
        if not torch.is_grad_enabled():
            return None
        step = self.trainer.state.global_step + 1
        if step == 3:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output * torch.nan if step == 2 else None

    def on_step_end(self, args, state, control, **kwargs):
        trained = [whole(weight) for weight in self.trainer.model.parameters() if weight.requires_grad]
        self.weights.append(torch.cat([weight.flatten() for weight in trained]))


def train_poisoned(folder: str, settings: dict[str, Any], is_packed: bool) -> dict[str, Any]:
    """Train with steps that are not finite; and the weights after each step, and what is counted."""
    training_args.is_torch_bf16_gpu_available = lambda: True  # else transformers refuses bf16 without `use_cpu`
    trainer = tiny_trainer(folder, base=own_base(folder, is_packed), **settings)
    if not trainer.args.bf16:
        make_full_precision(trainer)
    poison = Poison(trainer)
    trainer.train()
    return result_of(trainer) | {"after": poison.weights, "counts": trainer.state.stateful_callbacks[STATE_NAME]}


def make_full_precision(trainer: OrdMoETrainer) -> None:
    """Have the adapter in float32, which TRL casts to bfloat16 where experts are in 4 bits."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train_sharded(folder: str, settings: dict[str, Any], quant_storage: str | None = None) -> dict[str, Any]:
    """Train under FSDP2 where there are several processes; and what becomes of the expert stacks."""
    base = packed_base(quant_storage, f"{folder}-base-{os.getpid()}") if quant_storage else None
    trainer = tiny_trainer(folder, base=base, sharded=True, **settings)
    make_full_precision(trainer)
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
    return said_by(tiny_trainer, folder, sharded=True, **settings)


class TerminateLast(TrainerCallback):
    """Sends SIGTERM to the last process alone, within the second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(folder: str) -> str:
    """What a run says that one process is told to end."""
    trainer = tiny_trainer(folder)
    trainer.add_callback(TerminateLast())
    return said_by(trainer.train)


def end_of_uneven_training(folder: str, settings: dict[str, Any]) -> str:
    """What [`train_unevenly`] ends with."""
    return said_by(train_unevenly, folder, settings)


def refusals_of_zero3(base: str, settings: dict[str, Any]) -> tuple[str, str]:
    """What is said under ZeRO-3 to training without recomputation, and to a model that was shared out when loaded."""
    again = OrdMoETrainingArguments(base, **(SETTINGS | settings))  # transformers shares out as long as this lives
    model = type(models.qwen3_moe()).from_pretrained(base)
    assert again.deepspeed_plugin.zero_stage == 3
    once = settings | {"gradient_checkpointing": False}
    return said_by(OrdMoETrainingArguments, base, **(SETTINGS | once)), said_by(MoEModel.of, model)


def said_by(function: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """The message of the error that `function` ends with."""
    try:
        function(*arguments, **settings)
    except OrdMoEError as error:
        return str(error)
    return "nothing"


def command(arguments: list[str]) -> int:
    """`ordmoe` with these arguments."""
    return main(arguments)
