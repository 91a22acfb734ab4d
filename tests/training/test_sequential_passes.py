"""Tier passes one after another against all at once: same losses, same gradients, in every setting."""

import pytest
import torch

from ordmoe_peft.training.losses import TierLoss
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


def distance(gradients, others) -> float:
    """Norm of the difference over the norm."""
    return sum((others[name] - g).square().sum() for name, g in gradients.items()).sqrt() / norm(gradients)


def norm(gradients) -> float:
    return sum(gradient.square().sum() for gradient in gradients.values()).sqrt()


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
    "bf16": {"bf16": True, "use_cpu": True},
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
    (loss, gradients, metrics), (other_loss, others, other_metrics) = results
    # bf16 rounds a matrix of another height otherwise, and then routers choose otherwise.
    rtol = 0.1 if name == "bf16" else 1e-6
    torch.testing.assert_close(other_loss, loss, rtol=rtol, atol=0)
    assert others.keys() == gradients.keys()
    assert distance(gradients, others) < rtol
    assert other_metrics == pytest.approx(metrics, rel=10 * rtol, abs=rtol)


def forwards(folder, **changes) -> list[tuple[int, bool]]:
    """Rows of each forward of a training step, and whether it has a gradient."""
    model, seen = adapted(), []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(kwargs["input_ids"]), torch.is_grad_enabled())), with_kwargs=True
    )
    stepped(folder, "sequential", model, **changes)
    return seen


def test_no_forward_has_more_rows_than_the_batch(tmp_path):
    """A middle tier is run before any graph is kept; only objectives that are no sum over tiers precompute scores."""
    trained, scored = (4, True), (4, False)
    assert forwards(tmp_path, log_tiers_every=0) == [trained] * 2
    assert forwards(tmp_path, log_tiers_every=1) == [scored, trained, trained]
    assert forwards(tmp_path, objective="plackett_luce") == [scored] * 2 + [trained] * 3
    # All tiers of the frozen base come first.
    assert forwards(tmp_path, objective="dpo") == [scored] * 3 + [scored] * 2 + [trained] * 3


def test_dropout_is_the_same_when_scores_are_precomputed(tmp_path, monkeypatch):
    """What a later pass adds to the loss is then nothing but its gradient."""
    added = []
    added_by = TierLoss.added

    def noted(self, scores, previous):
        loss = added_by(self, scores, previous)
        if previous is not None:
            added.append(loss)
        return loss

    monkeypatch.setattr(TierLoss, "added", noted)
    gradients = []
    for seed in (0, 1):
        model = adapted(lambda: models.qwen3_moe(attention_dropout=0.5))
        changes = {"objective": "plackett_luce", "erl_coef": 1.0, "seed": seed, "data_seed": 0}
        gradients.append(stepped(tmp_path, "sequential", model, **changes)[1])
    assert len(added) == 4
    assert all(loss.abs() < 1e-6 and loss.requires_grad for loss in added)
    assert distance(*gradients) > 0.1


def test_training_takes_the_same_course(tmp_path):
    """With accumulation, a clipped gradient norm, and evaluation between."""
    changes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "erl_coef": 0.3,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 1.0,
    }
    results = []
    for mode in ("batched", "sequential"):
        trainer = trainer_for(tmp_path, tier_passes=mode, **changes)
        losses, weights = trained(trainer)
        results.append((losses, weights, trainer.evaluate(text.conversations())))
    (losses, weights, evaluated), (other_losses, other_weights, other_evaluated) = results
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in evaluated.items():
        if "per_second" not in name and "runtime" not in name:
            assert other_evaluated[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize(
    ("objective", "build"),
    [("erl", models.qwen3_moe), ("logistic", models.qwen3_moe), ("erl", models.qwen3_vl_moe)],
)
def test_small_micro_batches_are_one_large_batch_however_unequal(tmp_path, mode, objective, build):
    """Eight rows at once, one by one, and as three, three and two; answers of two tokens, of three, and none.

    Qwen3-VL says of its own forward that it takes no token counts.
    """
    dataset = text.conversations(vary_length=True)
    gradients = []
    for sizes in ([8], [1] * 8, [3, 3, 2]):
        trainer = trainer_for(
            tmp_path,
            adapted(build),
            tier_passes=mode,
            dataset=dataset,
            objective=objective,
            balance_coef=0.0,
            erl_coef=0.3,
            per_device_train_batch_size=8,
        )
        batch = one_batch(trainer)
        batch["labels"][1] = -100
        batch["labels"][2, -2] = -100
        parts = [
            dict(zip(batch, values, strict=True))
            for values in zip(*(value.split(sizes) for value in batch.values()), strict=True)
        ]
        batches, num_items = trainer.get_batch_samples(iter(parts), len(parts), torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = len(batches)
        for part in batches:
            trainer.training_step(trainer.model, dict(part), num_items)
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert distance(gradients[0], gradients[1]) < 1e-5
    assert distance(gradients[0], gradients[2]) < 1e-5


@pytest.mark.parametrize("objective", ["erl", *sorted(BETA)])
def test_rows_without_a_response_change_nothing(tmp_path, objective):
    def loss_of(rows):
        trainer = trainer_for(tmp_path, adapted(), objective=objective, erl_coef=0.3, balance_coef=0.0)
        batch = one_batch(trainer)
        batch["labels"][1] = -100
        return stepped(
            tmp_path,
            "batched",
            batch={name: value[rows] for name, value in batch.items()},
            objective=objective,
            erl_coef=0.3,
            balance_coef=0.0,
        )[:2]

    (loss, gradients), (other_loss, others) = loss_of([0, 2, 3]), loss_of([0, 1, 2, 3])
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
    assert distance(gradients, others) < 1e-5
