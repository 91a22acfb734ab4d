from types import SimpleNamespace

import pytest

from ordmoe_peft.training import callbacks
from ordmoe_peft.training.callbacks import FailureWatch
from tests import models
from tests.training.test_trainer import adapted, trainer_for


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(callbacks.logger, "warning", messages.append)
    return messages


def feed(watch, tops, is_main=True):
    """Log tier 1's likelihood step by step, as the trainer does: history first, then callbacks."""
    state = SimpleNamespace(global_step=0, is_world_process_zero=is_main, log_history=[])
    for state.global_step, top in enumerate(tops, start=1):
        state.log_history.append(
            {"step": state.global_step, "tier_1/log_likelihood": top, "tier_2/log_likelihood": -2.0}
        )
        watch.on_log(SimpleNamespace(erl_coef=0.5), state, None, logs=state.log_history[-1])


# The median of three falls with the second low value, at step 7.
FALLS = [-0.5] * 5 + [-3.0] * 5


def test_a_signature_is_named_once_and_when_it_first_shows(warnings):
    feed(FailureWatch(100), FALLS)
    assert len(warnings) == 1
    assert warnings[0].startswith("Step 7, tier_1_falling: Tier 1's likelihood fell from -0.500 (step 3) to -3.000")


def test_healthy_training_is_silent(warnings):
    feed(FailureWatch(100), FALLS[::-1])
    assert warnings == []


def test_other_processes_are_silent(warnings):
    feed(FailureWatch(100), FALLS, is_main=False)
    assert warnings == []


def test_a_trainer_whose_low_tiers_run_away_says_so(tmp_path, warnings):
    """A large weight of the expert-rank loss soon pushes the low tiers below a uniform guess over the vocabulary."""
    trainer = trainer_for(tmp_path, adapted(), max_steps=12, erl_coef=20.0, learning_rate=3e-2)
    trainer.train()
    (message,) = [message for message in warnings if "low_tiers_running_away" in message]
    assert f"below a uniform guess over {models.VOCAB_SIZE} tokens" in message
