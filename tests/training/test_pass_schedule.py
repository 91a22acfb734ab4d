"""Which batches run at once under `tier_passes="auto"`, and what says so."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from transformers import TrainerState

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training import pass_schedule
from ordmoe_peft.training.pass_memory import PassMemory
from ordmoe_peft.training.pass_schedule import PassSchedule
from tests.training.test_trainer import adapted, arguments, trained, trainer_for


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(pass_schedule.logger, "warning", messages.append)
    return messages


def run(folder, monkeypatch, peak, resume=None, **changes):
    """Rows of each forward of two steps of four rows of ten tokens, where a pass is said to take `peak` of 100."""

    @contextmanager
    def measured(device):
        memory = PassMemory(free=100)
        yield memory
        memory.peak = peak

    monkeypatch.setattr(pass_schedule, "measured_passes", measured)
    model, rows = adapted(), []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {"tier_passes": "auto", "max_steps": 2, "log_tiers_every": 0} | changes
    trainer = trainer_for(folder, model, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return rows


def test_auto_measures_the_first_batch_and_then_runs_what_fits_at_once(tmp_path, monkeypatch, told):
    assert run(tmp_path, monkeypatch, peak=10) == [4, 4, 8]
    (message,) = told
    assert "tier_passes='auto'" in message
    # 36 tokens took 10 bytes; half of 100 are 5 times as much, of which each tier has half.
    assert "batches of up to 90 tokens run their 2 tier passes at once, others one after another" in message
    told.clear()
    assert run(tmp_path, monkeypatch, peak=80) == [4, 4, 4, 4]
    assert "others one after another" in told[0]
    told.clear()
    assert run(tmp_path, monkeypatch, peak=0) == [4, 4, 4, 4]
    assert "cannot be measured on cpu, so all batches run their tier passes one after another" in told[0]


def test_a_resumed_run_keeps_to_what_was_measured(tmp_path, monkeypatch, told):
    run(tmp_path, monkeypatch, peak=10, save_strategy="steps", save_steps=1)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["OrdMoEPassSchedule"]["max_tokens"] > 40
    told.clear()
    # Now nothing would fit, but the first run has chosen.
    assert run(tmp_path, monkeypatch, peak=99, resume=str(tmp_path / "checkpoint-1")) == [8]
    assert told == []


def test_offloaded_activations_are_reason_enough(told):
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, is_main_process=True)
    schedule = PassSchedule("auto", 2, accelerator, saves_memory=True)
    schedule.on_train_begin(None, TrainerState(), None)
    assert schedule.max_tokens == 0
    assert "activations are offloaded to save memory, so all batches run their tier passes one after another" in told[0]


@pytest.mark.parametrize("mode", ["auto", "batched", "sequential"])
def test_one_tier_has_nothing_to_choose(tmp_path, told, mode):
    losses, _ = trained(trainer_for(tmp_path, adapted(num_tiers=1), tier_passes=mode, max_steps=1))
    assert len(losses) == 1
    assert told == []


def test_deepspeed_updates_within_backward():
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(OrdMoEConfigError, match="tier_passes='sequential' takes a backward for each tier"):
        PassSchedule("sequential", 2, deepspeed)
    assert PassSchedule("auto", 2, deepspeed).max_tokens == float("inf")
    assert PassSchedule("sequential", 1, deepspeed).max_tokens == float("inf")


def test_unknown_ways_are_refused(tmp_path):
    with pytest.raises(OrdMoEConfigError, match="tier_passes must be one of .*got 'streamed'"):
        arguments(tmp_path, tier_passes="streamed")
