"""What the processes of distributed tests run. Imported once, by the server that they are forked from."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
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
    dataset: Any = None,
    evaluated: Any = None,
    base: Any = None,
    **settings: Any,
) -> OrdMoETrainer:
    """A trainer of a tiny Qwen3-MoE, or of `base`, on the CPU."""
    args = OrdMoETrainingArguments(str(folder), **(SETTINGS | settings))
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


def train(trainer: OrdMoETrainer, **resume: Any) -> dict[str, Any]:
    """Train; the logs of the steps, and the trained weights, whole."""
    trainer.train(**resume)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: getattr(p, "full_tensor", p.clone)().clone() for name, p in weights.items()},
    }


def train_kw(folder, settings):
    return train(tiny_trainer(folder, **settings))


def train_fsdp(folder, settings, resume=None):
    trainer = fsdp_trainer(folder, **settings)
    kinds = {type(p.data).__name__ for p in trainer.model.parameters()}
    result = train(trainer, resume_from_checkpoint=resume) | {"before": kinds}
    return result | {"kinds": {(type(p.data).__name__, p.dtype, p.requires_grad) for p in trainer.model.parameters()}}


def fsdp_trainer(folder, packed=None, **settings):
    args = OrdMoETrainingArguments(str(folder), **SETTINGS)
    _ = args.device
    base = None
    if packed:
        from ordmoe_peft.quantization.storage import pack_experts
        from ordmoe_peft.moe_layers import find_moe_layers

        base = models.qwen3_moe(moe_intermediate_size=32)
        for layer in find_moe_layers(base):
            for name in layer.projections:
                weight = getattr(layer.experts, name)
                setattr(layer.experts, name, pack_experts(weight.data, name, quant_storage=getattr(torch, packed)))
        base.set_experts_implementation("ordmoe")
    import transformers.trainer
    import accelerate.accelerator

    # accelerate takes a CPU run for DDP whatever the configuration says
    def post(self, *a, _old=accelerate.accelerator.AcceleratorState.__init__, **k):
        PartialState().distributed_type = DistributedType.MULTI_GPU
        _old(self, *a, **k)

    import os

    if os.environ.get("WORLD_SIZE"):
        accelerate.accelerator.AcceleratorState.__init__ = post
    trainer = tiny_trainer(folder, base=base, **settings)
    return trainer
