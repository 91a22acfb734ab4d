"""Which batches run at once under `tier_passes="auto"`, and what says so."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainerState

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training import pass_schedule
from ordmoe_peft.training.pass_schedule import PassSchedule
from tests.training.test_trainer import adapted, arguments, trained, trainer_for


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(pass_schedule.logger, "warning", messages.append)
    return messages


class FakeMeter:
    """Says that a pass takes `a_pass` of `free_bytes`."""

    def __init__(self, a_pass, free_bytes):
        self.a_pass, self.free_bytes = a_pass, free_bytes

    def free(self):
        return self.free_bytes

    def restart(self):
        return 1000

    def peak(self):
        return 1000 + self.a_pass


def run(folder, monkeypatch, meter, resume=None, **changes):
    """Rows of each forward of two steps of four rows of nine and ten tokens, as this meter measures the first."""
    monkeypatch.setattr(pass_schedule, "meter_of", lambda device: meter)
    model, rows = adapted(), []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {"tier_passes": "auto", "max_steps": 2, "log_tiers_every": 0} | changes
    trainer = trainer_for(folder, model, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return rows


def adapter_bytes() -> int:
    return sum(parameter.nbytes for parameter in adapted().parameters() if parameter.requires_grad)


AT_ONCE, ONE_AFTER_ANOTHER = [4, 4, 8], [4, 4, 4, 4]


def test_auto_measures_the_first_batch_and_then_runs_what_fits_at_once(tmp_path, monkeypatch, told):
    """36 tokens took an adapter's size; on two tiers at once n tokens take n / 18 of it."""
    size = adapter_bytes()
    # Of 8.6 sizes gradients and AdamW's two states take 3, and 80 % of the rest are 4.48, so room for 80 tokens.
    assert run(tmp_path, monkeypatch, FakeMeter(size, int(8.6 * size))) == AT_ONCE
    (message,) = told
    assert "tier_passes='auto': a pass over 36 tokens took 0.00 GiB; 0.00 GiB were free, of which 0.00 GiB" in message
    assert "80% of the rest may be used, so batches of up to 80 tokens run their 2 tier passes at once" in message


@pytest.mark.parametrize(
    ("sizes", "changes", "rows"),
    [
        (6.0, {}, AT_ONCE),  # 80 % of 3 are 2.4; the second batch has 40 tokens and takes 2.2
        (5.4, {}, ONE_AFTER_ANOTHER),  # 80 % of 2.4 are 1.9; if one forgot the states, of 4.4
        (5.4, {"optim": "sgd"}, AT_ONCE),
        (5.4, {"optim": "adafactor"}, ONE_AFTER_ANOTHER),  # taken for AdamW
        (3.4, {"optim": "sgd"}, ONE_AFTER_ANOTHER),  # 80 % of 2.4; if one forgot the gradients, of 3.4
        (1.0, {}, ONE_AFTER_ANOTHER),
    ],
)
def test_gradients_and_states_that_do_not_exist_yet_need_their_room(tmp_path, monkeypatch, told, sizes, changes, rows):
    size = adapter_bytes()
    assert run(tmp_path, monkeypatch, FakeMeter(size, int(sizes * size)), **changes) == rows
    assert len(told) == 1


def test_sizes_are_named(tmp_path, monkeypatch, told):
    run(tmp_path, monkeypatch, FakeMeter(3 * 2**29, 2**32))
    assert "took 1.50 GiB; 4.00 GiB were free" in told[0]
    assert "so all batches" not in told[0]
    told.clear()
    run(tmp_path, monkeypatch, FakeMeter(2**31, 0))
    assert "so all batches run their tier passes one after another." in told[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_resumed_run_keeps_to_what_was_measured(tmp_path, monkeypatch, told, micro_batches):
    size = adapter_bytes()
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": micro_batches}
    run(tmp_path, monkeypatch, FakeMeter(size, 10 * size), **settings)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["OrdMoEPassSchedule"]["max_tokens"] > 40
    told.clear()
    # Now nothing would fit, but the first run has chosen.
    resumed = run(tmp_path, monkeypatch, FakeMeter(size, 0), str(tmp_path / "checkpoint-1"), **settings)
    assert resumed == [8] * micro_batches
    assert told == []


def test_states_that_a_resumed_run_has_need_no_room(tmp_path, monkeypatch, told):
    """It was begun tier by tier, so `auto` has yet to measure."""
    size = adapter_bytes()
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    run(tmp_path, monkeypatch, None, tier_passes="sequential", **settings)
    checkpoint = str(tmp_path / "checkpoint-1")
    assert run(tmp_path, monkeypatch, FakeMeter(size, int(5.4 * size)), checkpoint, **settings) == AT_ONCE
    assert len(told) == 1


def test_other_devices_run_tier_by_tier_and_say_why(tmp_path, monkeypatch, told):
    assert run(tmp_path, monkeypatch, None) == ONE_AFTER_ANOTHER
    assert "cannot be measured on cpu, so all batches run their tier passes one after another" in told[0]


def begun(*devices, state=None, **settings) -> PassSchedule:
    """A schedule at the beginning of a run that trains a weight on each of these devices."""
    weights = [torch.nn.Parameter(torch.ones(1, device=device)) for device in devices]
    args, optimizer = SimpleNamespace(optim="adamw_torch"), torch.optim.AdamW(weights)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO,
        is_main_process=True,
        device=torch.device(devices[0]),
        gather=lambda tensor: tensor,
    )
    schedule = PassSchedule("auto", 2, accelerator, **settings)
    schedule.on_train_begin(args, state or TrainerState(), None, optimizer=optimizer)
    return schedule


def train_on(schedule, tokens) -> bool:
    """Whether so many tokens are trained on tier by tier."""
    with schedule.of_training({"input_ids": torch.zeros(1, tokens)}) as is_tier_by_tier:
        return is_tier_by_tier


def test_a_short_first_batch_does_not_decide_for_longer_ones(monkeypatch, told):
    """A pass takes 500 bytes, and 1 for each token: one of 10 tokens seems to take 51 for each."""
    meter = FakeMeter(510, 10_000)
    monkeypatch.setattr(pass_schedule, "meter_of", lambda device: meter)
    schedule = begun("cpu")
    assert train_on(schedule, 10)
    # 16 of the bytes are for a gradient and states; 80 % of the others are 7,987, of which a token takes 102.
    assert schedule.max_tokens == 78
    assert not train_on(schedule, 78)
    state = TrainerState(stateful_callbacks=dict(schedule.state.stateful_callbacks))
    meter.a_pass = 1500
    for each in (schedule, begun("cpu", state=state)):
        assert train_on(each, 1000)
        assert each.max_tokens == 2662  # of 3
        assert not train_on(each, 2600)
    assert [message.split(" took ")[0] for message in told] == [
        "tier_passes='auto': a pass over 10 tokens",
        *["tier_passes='auto': a pass over 1000 tokens"] * 2,
    ]


@pytest.mark.parametrize(("tokens", "expected"), [(150, 78), (200, 78), (201, 160)])
def test_batches_that_are_not_much_longer_are_not_measured(monkeypatch, told, tokens, expected):
    meter = FakeMeter(5100, 10_000)
    monkeypatch.setattr(pass_schedule, "meter_of", lambda device: meter)
    schedule = begun("cpu")
    assert train_on(schedule, 100)
    assert schedule.max_tokens == 78
    meter.a_pass = 5000
    assert train_on(schedule, tokens)
    assert schedule.max_tokens == expected


def test_no_room_is_no_room_for_longer_batches_either(monkeypatch, told):
    monkeypatch.setattr(pass_schedule, "meter_of", lambda device: FakeMeter(10, 16))
    schedule = begun("cpu")
    assert train_on(schedule, 10) and train_on(schedule, 100)
    assert len(told) == 1


def test_offloaded_activations_are_reason_enough(told):
    assert begun("cpu", saves_memory=True).max_tokens == 0
    assert "activations are offloaded to save memory, so all batches run their tier passes one after another" in told[0]


def test_a_model_on_several_devices_is_not_measured_on_one_of_them(told):
    assert begun("cpu").max_tokens is None
    assert begun("cpu", "meta").max_tokens == 0
    assert "the model is split over 2 devices, of which one alone can be measured" in told[0]


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
