import logging
from types import SimpleNamespace

import pytest

from ordmoe_peft.training.callbacks import LikelihoodWatch


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(logging.getLogger("ordmoe_peft.training.callbacks"), "warning", messages.append)
    from ordmoe_peft.training import callbacks

    monkeypatch.setattr(callbacks.logger, "warning", messages.append)
    return messages


def feed(watch, likelihoods):
    for step, (top, bottom) in enumerate(likelihoods):
        logs = {"tier_1/log_likelihood": top, "tier_3/log_likelihood": bottom}
        watch.on_log(SimpleNamespace(erl_coef=0.5), SimpleNamespace(global_step=step), None, logs=logs)


def test_warns_once_when_both_fall(warnings):
    feed(LikelihoodWatch(3), [(-1.0, -2.0), (-0.5, -3.0), (-0.9, -5.0), (-2.0, -9.0)])
    assert len(warnings) == 1
    assert "Step 2: the likelihood of tier 1 fell from -0.500 to -0.900" in warnings[0]
    assert "erl_coef (now 0.5)" in warnings[0]


@pytest.mark.parametrize(
    "likelihoods",
    [
        [(-1.0, -2.0), (-0.5, -9.0), (-0.55, -20.0)],
        [(-1.0, -2.0), (-3.0, -1.5)],
    ],
    ids=["tier 1 holds", "the bottom rises"],
)
def test_is_silent_otherwise(warnings, likelihoods):
    feed(LikelihoodWatch(3), likelihoods)
    assert warnings == []
