"""Tier passes one after another against all at once: same losses, same gradients, in every setting."""

import pytest
import torch
from torch import nn

from ordmoe_peft.training.tier_passes import TierPasses
from tests import models, text
from tests.training.test_tier_passes import BETA
from tests.training.test_trainer import adapted, one_batch, trained, trainer_for


def stepped(folder, mode, model=None, batch=None, step=0, **changes):
    """Loss, gradients and logged metrics of one training step, as the trainer's loop takes it."""
    trainer = trainer_for(folder, adapted() if model is None else model, tier_passes=mode, **changes)
    trainer.state.global_step = step
    batch = batch or one_batch(trainer)
    batches, num_items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, dict(batches[0]), num_items)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_alike(one, other, rtol=1e-5):
    (loss, gradients, metrics), (other_loss, other_gradients, other_metrics) = one, other
    torch.testing.assert_close(other_loss, loss, rtol=rtol, atol=0)
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (other_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert difference < rtol, name
    assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


SETTINGS = {
    "erl": {},
    "floor": {"lower_tier_floor": "uniform"},
    **{objective: {"objective": objective} for objective in sorted(BETA)},
    "generated": {"responses": "generated", "max_completion_length": 4},
    "policy": {"responses": "generated", "scored_by": "policy", "max_completion_length": 4, "objective": "dpo"},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "balance_coef": 0.0,
    },
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_all_tiers_at_once(tmp_path, name):
    changes = {"erl_coef": 0.3, "balance_coef": 0.1, "log_tiers_every": 4} | SETTINGS[name]
    results = []
    for mode in ("batched", "sequential"):
        model = adapted(grouping="random")
        if changes.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable(changes.get("gradient_checkpointing_kwargs"))
            model.enable_input_require_grads()
        results.append(stepped(tmp_path, mode, model, step=4, **changes))
    # In bf16 the two batches' matrices are rounded in another order.
    assert_alike(*results, rtol=3e-2 if name == "bf16" else 1e-5)
