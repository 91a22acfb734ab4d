"""Steps with something that is not finite, or without responses, leave the weights alone, and say why."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import TrainerState

from ordmoe_peft.errors import OrdMoEConfigError, OrdMoERuntimeError
from ordmoe_peft.forward import running_forward
from ordmoe_peft.training import step_guard
from tests import models
from tests.training.test_precision import FP16, Scaled, ScaledTooFar, overflows
from tests.training.test_trainer import adapted, arguments, trainer_for


MODES = pytest.mark.parametrize("mode", ["batched", "sequential"])


class Poison:
    """Makes the rows of one tier NaN at the steps given, in the forward or in the backward alone."""

    def __init__(self, tier, steps, part="forward"):
        self.tier, self.steps, self.part, self.trainer = tier, steps, part, None

    def put_on(self, trainer):
        self.trainer = trainer
        trainer.model.get_base_model().model.layers[1].mlp.register_forward_hook(self)

    def __call__(self, module, args, output):
        forward = running_forward()
        if self.trainer.state.global_step + 1 not in self.steps or not torch.is_grad_enabled():
            return None
        tiers = forward.plan.tiers if forward and forward.plan else torch.ones(1)
        is_tier = (tiers == self.tier).expand(len(output)).view(-1, 1, 1)
        if self.part == "forward":
            return output.masked_fill(is_tier, torch.nan)
        if is_tier.any():
            output.register_hook(lambda gradient: gradient.masked_fill(is_tier, torch.nan))
        return None


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(step_guard.logger, "warning", messages.append)
    return messages


def poisoned(folder, poison, model=None, **changes):
    """A trainer, and a list that gets a copy of its adapter after each step."""
    trainer = trainer_for(folder, model, **({"max_steps": 5, "erl_coef": 0.1} | changes))
    poison.put_on(trainer)
    history = []
    trainer.add_callback(Recorder(trainer, history))
    return trainer, history


class Recorder(step_guard.TrainerCallback):
    def __init__(self, trainer, history):
        self.trainer, self.history = trainer, history

    def on_step_end(self, args, state, control, **kwargs):
        weights = [p.detach().clone() for p in self.trainer.model.parameters() if p.requires_grad]
        moments = [s["exp_avg"].clone() for s in self.trainer.optimizer.state.values() if "exp_avg" in s]
        self.history.append(weights + moments)


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@MODES
@pytest.mark.parametrize("objective", ["erl", "dpo"])
def test_a_tier_that_is_not_finite_is_named_and_its_step_dropped(tmp_path, told, mode, objective):
    trainer, history = poisoned(tmp_path, Poison(3, {2, 3}), tier_passes=mode, objective=objective)
    trainer.train()
    assert [message.split(".")[0] for message in told] == [
        "Step 2: not finite: log-likelihood under tier 3",
        "Step 3: not finite: log-likelihood under tier 3",
    ]
    assert "10 such steps in a row end training (max_nonfinite_steps), and this is number 1." in told[0]
    assert same(history[0], history[1]) and same(history[1], history[2])
    assert not same(history[2], history[3]) and not same(history[3], history[4])
    assert all(tensor.isfinite().all() for tensor in history[-1])
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry.get("nonfinite_steps") for entry in logs] == [None, 1, 2, 2, 2]
    measured = [{"loss", "ntp_loss", "tier_3/log_likelihood"} & entry.keys() for entry in logs]
    assert [len(names) for names in measured] == [3, 0, 0, 3, 3]


@MODES
def test_a_gradient_that_is_not_finite_is_named_as_near_as_can_be(tmp_path, told, mode):
    trainer, history = poisoned(tmp_path, Poison(3, {2}, part="backward"), tier_passes=mode)
    trainer.train()
    tiers = "1 and 3" if mode == "batched" else "3"
    assert [message.split(". ")[0] for message in told] == [f"Step 2: not finite: gradient of the pass of tier {tiers}"]
    assert same(history[0], history[1])


def test_one_micro_batch_of_a_step_is_enough(tmp_path, told):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "tier_passes": "sequential"}
    trainer, history = poisoned(tmp_path, Poison(1, {2}), max_steps=2, **settings)
    trainer.train()
    assert len(told) == 1
    assert "log-likelihood under tier 1, supervised loss" in told[0]
    assert same(history[0], history[1])


def test_plain_fine_tuning_is_guarded_too(tmp_path, told):
    trainer, history = poisoned(tmp_path, Poison(1, {2}), model=adapted(num_tiers=1), balance_coef=0.0, max_steps=3)
    trainer.train()
    assert [message.split(". ")[0] for message in told] == ["Step 2: not finite: loss in the pass of tier 1"]
    assert same(history[0], history[1])


@MODES
def test_too_many_in_a_row_end_training_with_the_last_good_weights(tmp_path, told, mode):
    trainer, history = poisoned(
        tmp_path,
        Poison(3, {1, 3, 4, 5}),
        tier_passes=mode,
        max_nonfinite_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(OrdMoERuntimeError) as error:
        trainer.train()
    message = str(error.value)
    assert "ends at step 4: not finite: log-likelihood under tier 3. That is 2 steps in a row" in message
    assert "weights are those after step 2" in message
    assert f"The last checkpoint is `{tmp_path}/checkpoint-3`" in message
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(weight, p) for weight, p in zip(history[1], trainable, strict=False))
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "checkpoint-3").state_dict()
    saved = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    assert saved and all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_a_resumed_run_counts_on(tmp_path, told):
    settings = {"max_nonfinite_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer, _ = poisoned(tmp_path, Poison(3, {2}), max_steps=4, **settings)
    without_responses(trainer, {0})
    trainer.train()
    resumed, _ = poisoned(tmp_path, Poison(3, {6, 7}), max_steps=7, **settings)
    with pytest.raises(OrdMoERuntimeError, match="ends at step 7"):
        resumed.train(resume_from_checkpoint="auto")
    counted = [
        (log["step"], log["nonfinite_steps"], log["empty_batches"])
        for log in resumed.state.log_history[1:]
        if "learning_rate" in log
    ]
    assert counted == [(2, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 1), (6, 2, 1)]
    told.clear()
    at_once, _ = poisoned(tmp_path, Poison(3, {7}), max_steps=7, **settings)  # step 6 was one in a row
    with pytest.raises(OrdMoERuntimeError, match="That is 2 steps in a row"):
        at_once.train(resume_from_checkpoint="auto")
    assert told == []


def test_without_a_checkpoint_the_error_says_so(tmp_path, told):
    trainer, _ = poisoned(tmp_path / "none", Poison(3, {1}), max_nonfinite_steps=1)
    with pytest.raises(OrdMoERuntimeError, match="those after step 0. The last checkpoint is none: none was saved"):
        trainer.train()


def without_responses(trainer, batches):
    """Mask the labels of the micro-batches at these places."""
    collate, seen = trainer.data_collator, []

    def masked(rows):
        batch = collate(rows)
        if len(seen) in batches:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        seen.append(batch)
        return batch

    trainer.data_collator = masked


@MODES
@pytest.mark.parametrize("num_tiers", [1, 3])
def test_a_batch_without_responses_is_skipped_and_counted(tmp_path, told, mode, num_tiers):
    settings = {"model": adapted(num_tiers=num_tiers), "tier_passes": mode, "weight_decay": 0.1}
    trainer, history = poisoned(tmp_path, Poison(3, set()), max_steps=4, **settings)
    without_responses(trainer, {1})
    trainer.train()
    assert same(history[0], history[1])
    assert not same(history[1], history[2])
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry.get("empty_batches") for entry in logs] == [None, 1, 1, 1]
    assert ["loss" in entry for entry in logs] == [True, False, True, True]
    assert told == []


def test_a_micro_batch_without_responses_adds_nothing_to_its_step(tmp_path):
    """The first step has one such batch of two, and is that of the other batch alone."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "per_device_train_batch_size": 4}
    settings |= {"balance_coef": 0.0, "gradient_accumulation_steps": 2}
    whole, history = poisoned(tmp_path, Poison(3, set()), **settings)
    without_responses(whole, {1})
    whole.train()
    alone, other = poisoned(tmp_path, Poison(3, set()), **(settings | {"gradient_accumulation_steps": 1}))
    alone.train()
    for weight, wanted in zip(history[0], other[0], strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


class TestMeans:
    """Losses are means over the steps that moved the weights."""

    @MODES
    @pytest.mark.parametrize("num_tiers", [1, 3])
    def test_of_a_run_with_dropped_steps(self, tmp_path, mode, num_tiers):
        """The weights stand still, so what each real step measures can be known from a run that logs every step."""
        changes = {"learning_rate": 0.0, "max_steps": 5, "tier_passes": mode, "log_tiers_every": 1}
        poison = {"part": "backward"}  # the loss itself is finite
        each, _ = poisoned(tmp_path / "1", Poison(1, {2, 5}, **poison), adapted(num_tiers=num_tiers), **changes)
        each.train()
        wanted = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        assert len(wanted) == 3
        all_at_once, _ = poisoned(
            tmp_path / "2", Poison(1, {2, 5}, **poison), adapted(num_tiers=num_tiers), logging_steps=5, **changes
        )
        result = all_at_once.train()
        (entry,) = [log for log in all_at_once.state.log_history if "loss" in log]
        mean = sum(wanted) / 3
        assert entry["loss"] == pytest.approx(mean, rel=1e-6)
        assert result.training_loss == result.metrics["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert all_at_once.state.log_history[-1]["train_loss"] == result.training_loss
        for log in all_at_once.state.log_history:
            assert all(math.isfinite(value) for name, value in log.items() if name != "grad_norm")

    def test_of_steps_whose_loss_is_not_finite(self, tmp_path):
        trainer, _ = poisoned(tmp_path, Poison(1, {1, 2}), logging_steps=5, learning_rate=0.0)
        result = trainer.train()
        alone = trainer_for(tmp_path, max_steps=5, erl_coef=0.1, learning_rate=0.0)
        alone.train()
        wanted = [entry["loss"] for entry in alone.state.log_history if "loss" in entry][2:]
        assert result.training_loss == pytest.approx(sum(wanted) / 3, rel=1e-6)


class TestRunsThatLearnNothing:
    def test_weights_of_the_base_that_are_not_finite(self, tmp_path):
        model = adapted()
        model.get_base_model().model.norm.weight.data[3] = torch.nan
        trainer = trainer_for(tmp_path, model, save_strategy="steps", save_steps=1)
        with pytest.raises(OrdMoERuntimeError) as error:
            trainer.train()
        message = str(error.value)
        assert "4 of 4 steps did not move the weights: 4 with a loss or gradient that was not finite" in message
        assert "the last: log-likelihood under tier 1" in message
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_most_steps(self, tmp_path):
        trainer, _ = poisoned(tmp_path, Poison(3, {1, 2, 4}))
        with pytest.raises(OrdMoERuntimeError, match="3 of 5 steps"):
            trainer.train()
        assert poisoned(tmp_path, Poison(3, {1, 4}))[0].train().global_step == 5

    def test_a_resumed_run_that_was_at_its_end_still_says_so(self, tmp_path):
        settings = {"save_strategy": "steps", "save_steps": 1}
        for _ in range(2):
            trainer, _ = poisoned(tmp_path, Poison(3, {2, 3, 4}), **settings)
            with pytest.raises(OrdMoERuntimeError, match="3 of 5 steps"):
                trainer.train(resume_from_checkpoint="auto")

    def test_no_response_in_so_many_first_steps(self, tmp_path):
        trainer = trainer_for(tmp_path, max_nonfinite_steps=3, max_steps=6)
        without_responses(trainer, {0, 1, 2})
        with pytest.raises(OrdMoERuntimeError, match="3 of 3 steps .* 3 without a response to learn from"):
            trainer.train()

    def test_gradients_that_overflow_in_fp16(self, tmp_path):
        trainer, _ = poisoned(tmp_path, Poison(3, {1, 2, 4}, "backward"), max_steps=4, cls=Scaled, **FP16)
        with pytest.raises(OrdMoERuntimeError, match="3 of 4 steps .* 3 whose gradient overflowed in fp16"):
            trainer.train()


class TestGradientScaler:
    """In fp16 a gradient that is not finite is the scaler's: the optimizer does not step, and the scale falls."""

    @MODES
    @pytest.mark.parametrize(("optim", "max_grad_norm"), [("adamw_torch_fused", 1.0), ("adamw_torch", 0.0)])
    def test_an_overflow_moves_nothing_and_is_no_error(self, tmp_path, told, mode, optim, max_grad_norm):
        """In the second step and the third. The schedule of the learning rate waits for both."""
        changes = {"tier_passes": mode, "optim": optim, "max_grad_norm": max_grad_norm}
        trainer, history = poisoned(tmp_path, Poison(3, {2, 3}, "backward"), cls=Scaled, **changes, **FP16)
        trainer.train()
        assert told == []
        assert same(history[0], history[1]) and same(history[1], history[2])
        assert not same(history[2], history[3]) and not same(history[3], history[4])
        assert all(tensor.isfinite().all() for tensor in history[-1])
        assert trainer.accelerator.scaler.get_scale() == Scaled.scale / 4
        assert trainer._guard.num_dropped == trainer._guard.counts["overflowed_steps"] == 2
        logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
        assert [entry.get("overflowed_steps") for entry in logs] == [None, 1, 2, 2, 2]
        assert [entry["learning_rate"] for entry in logs] == pytest.approx([0.01, 0.008, 0.008, 0.008, 0.006])
        measured = [{"loss", "ntp_loss", "tier_3/log_likelihood"} & entry.keys() for entry in logs]
        assert [len(names) for names in measured] == [3, 0, 0, 3, 3]
        steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
        assert steps == {3}

    def test_a_scale_that_is_too_large_at_first_falls(self, tmp_path, told):
        """These are real overflows: the first steps, and later ones as rounding has it. None moves the weights."""
        settings = {"max_steps": 10, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **FP16}
        trainer, history = poisoned(tmp_path, Poison(3, set()), cls=ScaledTooFar, **settings)
        trainer.train()
        has_overflowed = overflows(trainer)
        assert 1 <= has_overflowed.index(False) <= 4
        start = [weight for weight in adapted().parameters() if weight.requires_grad]
        assert same(start, history[0][: len(start)])
        assert [same(*pair) for pair in pairwise(history)] == has_overflowed[1:]
        assert trainer._guard.counts["overflowed_steps"] == sum(has_overflowed)
        assert trainer.accelerator.scaler.get_scale() == ScaledTooFar.scale / 2 ** sum(has_overflowed)
        assert told == []

    @pytest.mark.parametrize(("mode", "max_grad_norm"), [("batched", 0.0), ("sequential", 1.0)])
    def test_a_loss_that_is_not_finite_is_still_an_error(self, tmp_path, told, mode, max_grad_norm):
        changes = {"tier_passes": mode, "max_grad_norm": max_grad_norm}
        trainer, history = poisoned(tmp_path, Poison(3, {2}), cls=Scaled, **changes, **FP16)
        trainer.train()
        assert [message.split(".")[0] for message in told] == ["Step 2: not finite: log-likelihood under tier 3"]
        assert same(history[0], history[1])
        assert not same(history[1], history[2])
        counts = trainer._guard.counts
        assert (counts["nonfinite_steps"], counts["overflowed_steps"]) == (1, 0)

    @pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
    def test_a_batch_without_responses_is_skipped(self, tmp_path, told, optim):
        changes = {"optim": optim, "max_grad_norm": 0.0, "weight_decay": 0.1, "max_steps": 4}
        trainer, history = poisoned(tmp_path, Poison(3, set()), cls=Scaled, **changes, **FP16)
        without_responses(trainer, {1})
        trainer.train()
        assert same(history[0], history[1])
        assert not same(history[1], history[2])
        counts = trainer._guard.counts
        assert (counts["empty_steps"], counts["overflowed_steps"]) == (1, 0)
        assert trainer.accelerator.scaler.get_scale() == Scaled.scale

    def test_overflow_that_no_scale_is_small_enough_for_ends_training(self, tmp_path):
        """From 2^16 it takes 17 steps to a scale of a half."""
        changes = {"max_steps": 30, "save_strategy": "steps", "save_steps": 1}
        trainer, history = poisoned(tmp_path, Poison(1, range(3, 31), "backward"), cls=Scaled, **changes, **FP16)
        with pytest.raises(OrdMoERuntimeError) as error:
            trainer.train()
        message = str(error.value)
        assert "ends at step 20: the gradient is not finite in fp16 even at a scale of 0.5, after 18 steps" in message
        assert f"The last checkpoint is `{tmp_path}/checkpoint-19`. Use bf16=True or fp16=False" in message
        assert same(history[1], history[18])


class TestDeepSpeed:
    """It has taken its step by the time that the guard looks. With DeepSpeed itself: `tests/distributed`."""

    def guard_after(self, tmp_path, rows, was_skipped, fp16=False):
        guard, state = step_guard.StepGuard(10, {}), TrainerState()
        args = SimpleNamespace(deepspeed_plugin="zero2", fp16=fp16, device=torch.device("cpu"), output_dir=tmp_path)
        guard.on_train_begin(args, state, None)
        guard.begin_step([rows])
        optimizer = SimpleNamespace(step_was_skipped=was_skipped, zero_grad=lambda: None)
        guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        guard.on_optimizer_step(args, state, None, optimizer=optimizer)
        return guard

    def test_a_step_that_it_dropped_was_not_finite(self, tmp_path, told):
        counts = self.guard_after(tmp_path, rows=2, was_skipped=True).counts
        assert (counts["nonfinite_steps"], counts["overflowed_steps"]) == (1, 0)
        assert told[0].startswith("Step 1: not finite: gradient. The update is dropped")

    def test_but_for_overflow_in_fp16(self, tmp_path, told):
        counts = self.guard_after(tmp_path, rows=2, was_skipped=True, fp16=True).counts
        assert (counts["nonfinite_steps"], counts["overflowed_steps"]) == (0, 1)
        assert not told

    def test_a_step_that_it_should_have_dropped_ends_training(self, tmp_path):
        message = (
            "ends at step 1: no process had a response to learn from, and DeepSpeed has updated .* none was saved yet"
        )
        with pytest.raises(OrdMoERuntimeError, match=message):
            self.guard_after(tmp_path, rows=0, was_skipped=False)


def test_at_least_one_step_may_fail(tmp_path):
    with pytest.raises(OrdMoEConfigError, match="max_nonfinite_steps must be at least 1, got 0"):
        arguments(tmp_path, max_nonfinite_steps=0)


@pytest.mark.parametrize(("changes", "message"), [({"num_train_epochs": 0, "max_steps": -1}, "took no step")])
def test_a_run_without_a_step_is_no_success(tmp_path, changes, message):
    with pytest.raises(OrdMoERuntimeError, match=message):
        trainer_for(tmp_path, **changes).train()


def test_weights_that_the_last_step_destroyed_are_no_success(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, learning_rate=1e39)
    with pytest.raises(OrdMoERuntimeError, match=r"trained weights are not finite .*lora_.*Lower learning_rate"):
        trainer.train()
