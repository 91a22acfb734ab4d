"""A learning rate for routers against two optimizers by hand."""

import math

import pytest
import torch

from ordmoe_peft import OrdMoETrainer
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training.router_rate import RouterRate
from tests import text
from tests.training.test_trainer import adapted, arguments, trainer_for


RATES = {"learning_rate": 1e-2, "router_learning_rate": 1e-3, "weight_decay": 0.1}


def is_of_router(name: str) -> bool:
    return ".gate." in name


def test_two_optimizers_by_hand(tmp_path):
    """Their gradients are the trainer's, so rates, decay and schedule are all that could differ."""
    trainer = trainer_for(tmp_path, **RATES, max_steps=3, lr_scheduler_type="cosine", max_grad_norm=0.0)
    weights = dict(trainer.model.named_parameters())
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    copies = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in trained.items()}
    by_hand = {
        1e-3: torch.optim.AdamW([c for n, c in copies.items() if is_of_router(n)], 1e-3, weight_decay=0.1),
        1e-2: torch.optim.AdamW([c for n, c in copies.items() if not is_of_router(n)], 1e-2, weight_decay=0.1),
    }
    gradients = []

    class Watch(RouterRate):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.append({name: weight.grad.clone() for name, weight in trained.items()})

    trainer.add_callback(Watch(0.0))
    trainer.train()
    for step, of_step in enumerate(gradients):
        for rate, optimizer in by_hand.items():
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / 3)) / 2
        for name, copy in copies.items():
            copy.grad = of_step[name]
        for optimizer in by_hand.values():
            optimizer.step()
    assert len(gradients) == 3
    assert any(map(is_of_router, trained)) and not all(map(is_of_router, trained))
    for name, copy in copies.items():
        torch.testing.assert_close(trained[name].data, copy.data, rtol=1e-5, atol=1e-7)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["router_learning_rate"] / entry["learning_rate"] for entry in logged] == pytest.approx([0.1] * 3)
    trainer.save_model()
    assert trainer.model.ordmoe_training["settings"]["router_learning_rate"] == 1e-3


@pytest.mark.parametrize("optim", ["sgd", "adamw_8bit", "adafactor", "rmsprop"])
def test_zero_holds_routers_still(tmp_path, optim):
    trainer = trainer_for(tmp_path, router_learning_rate=0.0, learning_rate=1e-2, optim=optim, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])}
    assert moved == {name for name in before if not is_of_router(name)}


def test_the_same_rate_changes_nothing(tmp_path):
    losses = []
    for rate in (None, 1e-2):
        trainer = trainer_for(tmp_path, router_learning_rate=rate)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_resumed_run_keeps_both(tmp_path):
    saves = RATES | {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(tmp_path, **saves)
    whole.train()
    resumed = trainer_for(tmp_path, **saves)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]
    with pytest.raises(OrdMoEConfigError, match="router_learning_rate"):
        trainer_for(tmp_path, **saves | {"router_learning_rate": 0.5}).train("auto")


@pytest.mark.parametrize(
    ("changes", "targets", "message"),
    [
        ({"router_learning_rate": -1.0}, ["router"], "router_learning_rate must not be negative, got -1.0"),
        ({"router_learning_rate": 0.1}, ["experts"], "router_learning_rate=0.1 has no effect with targets="),
        ({"router_learning_rate": 0.1, "optim": "adalomo"}, ["router"], "optim='adalomo'"),
    ],
)
def test_where_it_cannot_act(tmp_path, changes, targets, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        trainer_for(tmp_path, adapted(targets=targets), **changes)


def test_an_optimizer_that_is_given(tmp_path):
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(OrdMoEConfigError, match="an optimizer of yours"):
        OrdMoETrainer(
            model,
            args=arguments(tmp_path, router_learning_rate=0.1),
            train_dataset=text.conversations(),
            processing_class=text.tokenizer(),
            optimizers=(optimizer, None),
        )


def test_an_optimizer_without_the_factors():
    lone = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(OrdMoEConfigError, match="no effect on SGD, which does not hold the factors"):
        RouterRate(0.1).split_groups_(lone, adapted())
