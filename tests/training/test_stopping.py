"""SIGTERM ends a run after its step, with a checkpoint from which it goes on as if nothing had been."""

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from ordmoe_peft import OrdMoETrainer
from ordmoe_peft.errors import OrdMoEInterrupted
from ordmoe_peft.training.checkpoints import is_complete
from tests import text
from tests.training.test_trainer import adapted, arguments, trained, trainer_for


class Terminate(TrainerCallback):
    """Sends SIGTERM to this process within step `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(trainer, step: int) -> OrdMoEInterrupted:
    trainer.add_callback(Terminate(step))
    with pytest.raises(OrdMoEInterrupted) as end:
        trainer.train()
    return end.value


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}], ids=str)
def test_a_run_goes_on_as_if_nothing_had_been(tmp_path, saving):
    before = signal.getsignal(signal.SIGTERM)
    losses, weights = trained(trainer_for(tmp_path / "whole", **saving))
    out = tmp_path / "ended"
    end = interrupted(trainer_for(out, **saving), step=2)
    assert end.status == 143
    assert f"after step 2; checkpoint-2 in {out} is complete" in str(end)
    assert is_complete(out / "checkpoint-2") and not (out / "checkpoint-3").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = trainer_for(out, **saving)
    resumed.train("auto")
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    assert all(p.equal(weights[name]) for name, p in resumed.model.named_parameters() if p.requires_grad)


def test_the_step_is_saved_though_an_evaluation_would_not_find_it_the_best(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    trainer = OrdMoETrainer(
        adapted(),
        args=arguments(tmp_path, save_strategy="best", greater_is_better=True, **changes),
        train_dataset=text.conversations(),
        eval_dataset=text.conversations(),
        processing_class=text.tokenizer(),
    )
    assert "after step 2; checkpoint-2" in str(interrupted(trainer, step=2))
    assert is_complete(tmp_path / "checkpoint-2")
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1]


def test_no_checkpoint_before_a_step_has_moved_the_weights(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.model.get_base_model().model.norm.weight.data[:] = float("nan")
    assert "no checkpoint was saved" in str(interrupted(trainer, step=1))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_in_a_thread_signals_are_left_alone(tmp_path):
    """Python handles signals in the main thread alone."""
    trainer, before = trainer_for(tmp_path, max_steps=1), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_upstreams_checkpoint_on_sigterm_is_turned_off(tmp_path):
    assert not trainer_for(tmp_path, enable_jit_checkpoint=True).args.enable_jit_checkpoint
