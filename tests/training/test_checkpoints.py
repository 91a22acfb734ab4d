"""What can be resumed from is complete."""

import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, OrdMoETrainer, quantize_experts_
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training import checkpoints
from ordmoe_peft.training.checkpoints import (
    STATE_NAME,
    checkpoint_to_resume,
    discard,
    discard_oldest,
    last_checkpoint,
)
from ordmoe_peft.training.run_record import RunFolder
from tests import models, text
from tests.distributed.runs import tiny_trainer
from tests.training.test_trainer import arguments


FILES = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_NAME}


def write_checkpoint(folder: Path, step: int, whole: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").touch()
    if whole:
        (checkpoint / STATE_NAME).write_text("{}")
    return checkpoint


def best_of_three(folder: Path, **changes):
    """A trainer whose metric grows with every step, so that the first of its three checkpoints is the best."""
    settings = TestTrainer.SETTINGS | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "num_tokens", "greater_is_better": False}
    return tiny_trainer(folder, evaluated=text.conversations(4), **settings | changes)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFolders:
    @pytest.mark.parametrize("state", [None, "", '{"global_step": 4, "log_hist', "4"])
    def test_a_checkpoint_whose_state_cannot_be_read_is_none(self, tmp_path, state):
        write_checkpoint(tmp_path, 2)
        half = write_checkpoint(tmp_path, 4, whole=False)
        if state is not None:
            (half / STATE_NAME).write_text(state)
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")

    def test_a_deletion_that_is_cut_off_leaves_nothing_to_load(self, tmp_path, monkeypatch):
        """Or fails, as where an upload still reads a file, on disks that keep open ones."""
        checkpoint = write_checkpoint(tmp_path, 4)

        def cut_off(folder, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoints.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            discard(checkpoint)
        assert names(checkpoint) == {"adapter_model.safetensors"}
        assert last_checkpoint(tmp_path) is None
        monkeypatch.undo()
        discard(checkpoint)
        discard(checkpoint)  # another machine that shares the folder
        assert names(tmp_path) == set()

    def test_what_is_left_of_a_deletion_goes_first(self, tmp_path):
        """Its folder changed last."""
        for step, changed in ((2, 900), (4, 40), (6, 60), (8, 80)):
            os.utime(write_checkpoint(tmp_path, step, whole=step != 2), (0, changed))
        discard_oldest(tmp_path, 2, None)
        assert names(tmp_path) == {"checkpoint-6", "checkpoint-8"}

    def test_the_best_is_known_under_any_spelling(self, tmp_path, monkeypatch):
        for step in (2, 4, 6):
            write_checkpoint(tmp_path, step)
        monkeypatch.chdir(tmp_path)
        discard_oldest(tmp_path, 1, "./checkpoint-2")
        assert names(tmp_path) == {"checkpoint-2", "checkpoint-6"}

    @pytest.mark.parametrize(
        ("limit", "best", "kept"),
        [
            *((None, None, {2, 4, 6, 8}), (0, None, {2, 4, 6, 8}), (9, None, {2, 4, 6, 8})),
            *((2, None, {6, 8}), (1, None, {8}), (1, 2, {2, 8}), (2, 4, {4, 8})),
        ],
    )
    def test_the_oldest_go(self, tmp_path, limit, best, kept):
        for step in (2, 4, 6, 8):
            write_checkpoint(tmp_path, step)
        discard_oldest(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
        assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


class TestResuming:
    def test_the_last_complete_one(self, tmp_path):
        write_checkpoint(tmp_path, 4)
        write_checkpoint(tmp_path, 10)
        write_checkpoint(tmp_path, 12, whole=False)
        for wish in (True, "true", "auto"):
            assert checkpoint_to_resume(wish, tmp_path) == str(tmp_path / "checkpoint-10")
        for wish in (None, False, "false"):
            assert checkpoint_to_resume(wish, tmp_path) is None
        named = str(tmp_path / "checkpoint-4")
        assert checkpoint_to_resume(named, tmp_path) == named

    def test_none_is_there(self, tmp_path):
        assert checkpoint_to_resume("auto", tmp_path / "nothing") is None
        with pytest.raises(OrdMoEConfigError, match="no complete checkpoint in .*Give 'auto'"):
            checkpoint_to_resume(True, tmp_path)

    def test_the_one_named_is_incomplete(self, tmp_path):
        half = write_checkpoint(tmp_path, 4, whole=False)
        with pytest.raises(OrdMoEConfigError, match="checkpoint-4: no checkpoint, or one that was not written"):
            checkpoint_to_resume(str(half), tmp_path)

    def test_weights_alone_do_not_go_on_as_before(self, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(checkpoints.logger, "warning_once", said.append)
        (write_checkpoint(tmp_path, 2) / "rng_state.pth").touch()
        checkpoint_to_resume("auto", tmp_path)
        assert not said
        write_checkpoint(tmp_path, 4)
        checkpoint_to_resume("auto", tmp_path)
        assert len(said) == 1 and "checkpoint-4 holds the weights alone" in said[0]


class TestTrainer:
    SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}

    def test_a_save_that_fails_is_passed_over(self, tmp_path, monkeypatch):
        trainer = tiny_trainer(tmp_path, **self.SETTINGS)
        save = trainer._save_rng_state

        def full(folder):
            save(folder)
            if trainer.state.global_step == 4:
                assert "adapter_model.safetensors" in names(tmp_path / "checkpoint-4")
                raise OSError("No space left on device")

        monkeypatch.setattr(trainer, "_save_rng_state", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        assert "checkpoint-4" not in names(tmp_path), "the disk is full"
        assert [path.name for path in RunFolder(tmp_path).results] == ["checkpoint-2"]
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "rng_state_7.pth").touch()  # of a run with more processes, which was killed

        resumed = tiny_trainer(tmp_path, **self.SETTINGS)
        resumed.train(resume_from_checkpoint=True)
        assert {"checkpoint-2", "checkpoint-4", "checkpoint-6"} <= names(tmp_path)
        assert names(tmp_path / "checkpoint-4") == names(tmp_path / "checkpoint-6") >= FILES
        whole = tiny_trainer(tmp_path / "whole", **self.SETTINGS)
        whole.train()
        losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (resumed, whole)]
        assert len(losses[0]) == 6
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("best", [False, True])
    def test_an_adapter_in_16_bits_stays_so(self, tmp_path, best):
        """On a 4-bit base TRL has it in bf16; PEFT loads it as float32."""

        def trainer(folder, **changes):
            base = quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig())
            model = get_peft_model(base, OrdMoEConfig(r=4))
            evaluation = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2} if best else {}
            args = arguments(folder, lr_scheduler_type="constant", **self.SETTINGS | evaluation | changes)
            data = text.conversations()
            return OrdMoETrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=text.tokenizer())

        def weights(trainer):
            return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

        whole = trainer(tmp_path / "whole")
        whole.train()
        assert {weight.dtype for weight in weights(whole).values()} == {torch.bfloat16}
        trainer(tmp_path / "half", max_steps=2).train()
        resumed = trainer(tmp_path / "half")
        resumed.train(resume_from_checkpoint=True)
        for name, weight in weights(resumed).items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, weights(whole)[name]), name

    def test_the_saved_arguments_have_the_limit(self, tmp_path):
        tiny_trainer(tmp_path, **self.SETTINGS, save_total_limit=2).train()
        saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
        assert saved.save_total_limit == 2
        assert {"checkpoint-4", "checkpoint-6"} == {name for name in names(tmp_path) if name.startswith("checkpoint")}

    def test_a_run_that_was_at_its_end_is_not_trained_further(self, tmp_path):
        weights = []
        for _ in range(2):
            trainer = tiny_trainer(tmp_path, **self.SETTINGS)
            trainer.train(resume_from_checkpoint="auto")
            assert trainer.state.global_step == 6
            weights.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
        assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))

    def test_a_checkpoint_of_an_earlier_run_is_replaced_whole(self, tmp_path):
        (write_checkpoint(tmp_path, 2) / "of_the_earlier_run").touch()
        trainer = tiny_trainer(tmp_path, overwrite_output_dir=True, **self.SETTINGS | {"max_steps": 2})
        trainer.train()
        assert names(tmp_path / "checkpoint-2") >= FILES
        assert "of_the_earlier_run" not in names(tmp_path / "checkpoint-2")

    def test_the_best_checkpoint_is_known_by_its_place_and_kept(self, tmp_path):
        trainer = best_of_three(tmp_path, save_total_limit=1)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        assert best == str(tmp_path / "checkpoint-2")
        assert {name for name in names(tmp_path) if "checkpoint" in name} == {"checkpoint-2"}
        assert f'"best_model_checkpoint": "{best}"' in Path(best, STATE_NAME).read_text()

    def test_the_best_checkpoint_moves_along_with_its_folder(self, tmp_path, monkeypatch):
        (tmp_path / "first").mkdir()
        best_of_three(tmp_path / "first", max_steps=4).train()
        (tmp_path / "first").rename(tmp_path / "second")
        monkeypatch.chdir(tmp_path)
        moved = best_of_three("second", save_total_limit=1)
        moved.train(resume_from_checkpoint="auto")
        assert moved.state.best_model_checkpoint == "second/checkpoint-2"
        again = best_of_three(tmp_path / "second", save_total_limit=1)  # which is at its end
        again.train(resume_from_checkpoint="auto")
        assert {name for name in names(tmp_path / "second") if "checkpoint" in name} == {"checkpoint-2"}

    def test_the_oldest_are_deleted_when_the_newest_is_complete(self, tmp_path, monkeypatch):
        """With its state first, and the limit as it was."""
        seen = []

        def look(folder, **kwargs):
            seen.append((Path(folder).name, last_checkpoint(tmp_path)))
            assert STATE_NAME not in names(Path(folder))
            rmtree(folder, **kwargs)

        rmtree = checkpoints.shutil.rmtree
        monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path, **kw: Path(path).exists() and look(path, **kw))
        trainer = tiny_trainer(tmp_path, save_total_limit=1, **self.SETTINGS)
        trainer.train()
        steps = ((2, 4), (4, 6))
        assert seen == [(f"checkpoint-{old}", str(tmp_path / f"checkpoint-{new}")) for old, new in steps]
        assert trainer.args.save_total_limit == 1
