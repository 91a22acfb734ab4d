"""What training logs of its routers."""

import pytest
import torch
from transformers import TrainerCallback

from ordmoe_peft.monitoring.health import LayerHealth
from ordmoe_peft.monitoring.router_meter import RouterMeter
from ordmoe_peft.training import RouterHealth
from ordmoe_peft.training.router_health import METRICS, health_metrics
from tests import text
from tests.training.test_trainer import adapted, trainer_for


class Reporter(TrainerCallback):
    """Keeps what a reporting integration would send."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def logged(folder, model=None, **changes):
    """The training logs of a trainer with the callback, as reported, and the trainer."""
    trainer = trainer_for(folder, model, **({"max_steps": 2, "learning_rate": 0.0} | changes))
    reporter = Reporter()
    trainer.add_callback(reporter)
    RouterHealth.add_to(trainer)
    trainer.train()
    return [logs for logs in reporter.logs if "loss" in logs], trainer


def test_reporters_and_the_history_get_the_same_figures(tmp_path):
    reported, trainer = logged(tmp_path)
    names = {name for name in reported[0] if name.startswith("router/")}
    assert names == {*METRICS, *(f"{name}_worst" for name, (_, worst) in METRICS.items() if worst)}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for logs, entry in zip(reported, history, strict=True):
        assert {name: entry[name] for name in names} == {name: logs[name] for name in names}
    assert "router/imbalance" not in trainer.state.log_history[-1]  # of the whole run


def test_figures_are_of_tier_1_alone(tmp_path):
    """At a learning rate of 0 the one batch of each step gives the same figures outside of training."""
    model = adapted()
    reported, trainer = logged(tmp_path, model, max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad(), RouterMeter(model) as meter:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    wanted = health_metrics(meter.report())
    assert len(text.conversations()) == len(batch["input_ids"])
    assert {name: reported[0][name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_checkpointing_changes_nothing(tmp_path):
    plain, _ = logged(tmp_path)
    figures = [{name: value for name, value in logs.items() if name.startswith("router/")} for logs in plain]
    for reentrant in (True, False):
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        reported, _ = logged(tmp_path, balance_coef=0.0, **kwargs)
        for logs, wanted in zip(reported, figures, strict=True):
            assert {name: logs[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_each_log_starts_anew(tmp_path):
    """Drift grows from step to step, and its first log shows none of the later."""
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    reported, _ = logged(tmp_path, model, max_steps=3, learning_rate=5e-2)
    assert reported[0]["router/drift_kl"] == 0
    assert reported[0]["router/drift_overlap"] == 1
    assert reported[0]["router/drift_kl"] < reported[1]["router/drift_kl"] < reported[2]["router/drift_kl"]
    assert reported[2]["router/drift_kl_worst"] >= reported[2]["router/drift_kl"]


def test_hooks_leave_with_training(tmp_path):
    _, trainer = logged(tmp_path, max_steps=1)
    assert trainer.callback_handler.callbacks[0].meter is None
    before = sum(len(module._forward_hooks) for module in trainer.model.modules())
    trainer.train()
    assert sum(len(module._forward_hooks) for module in trainer.model.modules()) == before


def test_worst_layer_is_the_worse_end():
    def layer(**figures):
        values = dict.fromkeys(LayerHealth.__dataclass_fields__, 0.5) | {"drift_kl": None, "drift_overlap": None}
        return LayerHealth(**(values | figures))

    metrics = health_metrics([layer(dead=1, marginal_entropy=0.9), layer(dead=4, marginal_entropy=0.3)])
    assert (metrics["router/dead_experts"], metrics["router/dead_experts_worst"]) == (2.5, 4)
    assert metrics["router/marginal_entropy_worst"] == 0.3
    assert "router/token_entropy_worst" not in metrics
    assert "router/drift_kl" not in metrics
