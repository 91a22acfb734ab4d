"""A run goes on with its own results alone, and overwrites no other's unless it is told to."""

import json
from dataclasses import fields

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Picture
from trl import SFTConfig

from ordmoe_peft import OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training import run_record
from ordmoe_peft.training.run_record import DECISIVE, INDECISIVE, RECORD_NAME, RunFolder, describe_data, describe_run
from tests import models, text
from tests.training.test_trainer import adapted, arguments, trainer_for


SAVES = {"save_strategy": "steps", "save_steps": 2}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def described(model=None, **changes):
    model = adapted() if model is None else model
    return describe_run(model, model.peft_config["default"], arguments("out", **changes), {"digest": "of data"}).parts


class TestDescription:
    def test_names_are_those_of_settings(self):
        known = {field.name for field in fields(OrdMoETrainingArguments)}
        assert {*INDECISIVE} <= known - {field.name for field in fields(SFTConfig)}
        assert {*DECISIVE} <= known

    def test_it_is_the_same_for_the_same_run(self):
        assert described() == described()
        assert json.loads(json.dumps(described())) == described()

    @pytest.mark.parametrize(
        "changes",
        [
            {"max_steps": 40, "num_train_epochs": 9, "save_steps": 7, "logging_steps": 5, "dataloader_num_workers": 2},
            {"report_to": "tensorboard", "tier_passes": "sequential", "share_prompt": False, "max_nonfinite_steps": 3},
            {"gradient_checkpointing": True, "log_router_health": True, "save_total_limit": 1, "eval_steps": 3},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ],
        ids=lambda changes: ", ".join(changes),
    )
    def test_what_may_change(self, changes):
        assert described(**changes) == described()

    @pytest.mark.parametrize(
        "changes",
        [
            *({"learning_rate": 0.5}, {"erl_coef": 0.2}, {"balance_coef": 0.2}, {"objective": "dpo"}, {"seed": 3}),
            *({"per_device_train_batch_size": 2}, {"max_length": 7}, {"bf16": True, "use_cpu": True}),
            *({"lr_scheduler_type": "cosine"}, {"optim": "sgd"}, {"data_seed": 4}, {"responses": "generated"}),
        ],
        ids=str,
    )
    def test_what_may_not(self, changes):
        assert described(**changes)["settings"] != described()["settings"]

    def test_adapters(self):
        for other in ({"num_tiers": 2}, {"r": 2}, {"grouping": "random"}, {"targets": ["experts"]}):
            assert described(adapted(**other))["adapter"] != described()["adapter"]

    def test_bases(self):
        """Whatever the adapter's factors are, and in which place the base lies."""
        torch.manual_seed(1)
        model = adapted()
        model.config._name_or_path = "elsewhere"
        models.randomize_adapter(model)
        assert described(model)["base"] == described()["base"]
        assert described(adapted(lambda: models.qwen3_moe(num_experts_per_tok=1)))["base"] != described()["base"]
        model.get_base_model().model.layers[2].input_layernorm.weight.data[0] += 1
        assert described(model)["base"] != described()["base"]


class TestData:
    def test_columns_rows_and_contents_count(self):
        data = text.conversations()
        same = Dataset.from_list(data.to_list())
        assert describe_data(same) == describe_data(data)
        assert describe_data(data.to_iterable_dataset())["columns"] == describe_data(data)["columns"]
        changed = data.to_list()
        changed[5]["completion"][0]["content"] = "w4"
        for other in (
            data.select(range(7)),
            data.remove_columns("kind"),
            Dataset.from_list(changed),
            data.select([7, *range(7)]),
        ):
            assert describe_data(other) != describe_data(data)

    def test_images_count_too(self):
        def pictures(color):
            return Dataset.from_dict({"image": [Picture.new("RGB", (2, 2), color)]}).cast_column("image", Image())

        assert describe_data(pictures("red")) == describe_data(pictures("red")) != describe_data(pictures("blue"))
        stream = pictures("red").to_iterable_dataset()
        assert describe_data(stream) == describe_data(stream)


class TestTrainer:
    def test_another_run_is_refused_by_name(self, tmp_path):
        trainer_for(tmp_path, **SAVES).train()
        before = contents(tmp_path)
        other_base = adapted(lambda: models.qwen3_moe(num_experts_per_tok=1))
        for model, dataset, changes, named in (
            (None, None, {"learning_rate": 0.5}, r"settings.learning_rate \(0.01 there, 0.5 now\)"),
            (other_base, None, {}, r"base.num_experts_per_tok \(2 there, 1 now\)"),
            (adapted(num_tiers=2), None, {}, r"adapter.num_tiers \(3 there, 2 now\)"),
            (None, text.conversations(12), {}, r"data.rows \(8 there, 12 now\)"),
        ):
            trainer = trainer_for(tmp_path, model, dataset=dataset, **SAVES, **changes)
            for wish in ("auto", True, str(tmp_path / "checkpoint-2")):
                with pytest.raises(OrdMoEConfigError, match=named):
                    trainer.train(resume_from_checkpoint=wish)
        assert contents(tmp_path) == before

    def test_a_longer_run_goes_on_and_is_recorded(self, tmp_path):
        trainer_for(tmp_path, **SAVES).train()
        longer = trainer_for(tmp_path, **SAVES | {"max_steps": 6, "logging_steps": 2})
        assert longer.train(resume_from_checkpoint="auto").global_step == 6

    def test_a_fresh_run_overwrites_only_when_told_to(self, tmp_path):
        first = trainer_for(tmp_path, **SAVES, max_steps=6)
        first.train()
        first.save_model()
        before = contents(tmp_path)
        with pytest.raises(OrdMoEConfigError, match="has results of an earlier run, such as checkpoint-2.*overwrite"):
            trainer_for(tmp_path, **SAVES).train()
        assert contents(tmp_path) == before
        with pytest.raises(OrdMoEConfigError, match="Set one of them"):
            trainer_for(tmp_path, **SAVES, overwrite_output_dir=True).train(resume_from_checkpoint="auto")
        assert contents(tmp_path) == before
        trainer_for(tmp_path, **SAVES, learning_rate=0.1, overwrite_output_dir=True).train()
        assert [path.name for path in RunFolder(tmp_path).results] == ["checkpoint-2", "checkpoint-4"]
        assert RunFolder(tmp_path).record["settings"]["learning_rate"] == 0.1

    def test_a_run_without_results_binds_nobody(self, tmp_path):
        trainer_for(tmp_path).train()
        trainer_for(tmp_path, learning_rate=0.1).train()
        trainer_for(tmp_path, learning_rate=0.2).train(resume_from_checkpoint="auto")

    def test_results_without_a_record(self, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(run_record.logger, "warning", said.append)
        trainer = trainer_for(tmp_path, **SAVES)
        trainer.train()
        (tmp_path / RECORD_NAME).unlink()
        trainer_for(tmp_path, **SAVES, max_steps=6).train(resume_from_checkpoint="auto")
        assert "cannot be compared" in said[0]
        assert said[1:] == [f"Resuming from checkpoint-4 in {tmp_path}."]
        trainer.save_model(tmp_path / "adapter alone")
        with pytest.raises(OrdMoEConfigError, match="may be of another run"):
            trainer_for(tmp_path / "adapter alone", **SAVES).train(resume_from_checkpoint="auto")

    def test_a_checkpoint_from_elsewhere_must_be_of_the_same_base_and_adapter(self, tmp_path):
        trainer_for(tmp_path / "first", **SAVES).train()
        start = {"resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-2")}
        trainer_for(tmp_path / "second", **SAVES, learning_rate=0.1).train(**start)
        base = adapted(lambda: models.qwen3_moe(num_experts_per_tok=1))
        with pytest.raises(OrdMoEConfigError, match="first is of a run .* base.num_experts_per_tok"):
            trainer_for(tmp_path / "third", base, **SAVES).train(**start)

    def test_finished_is_what_was_as_long_and_left_its_results(self, tmp_path):
        trainer = trainer_for(tmp_path, **SAVES)
        trainer.train()
        assert not trainer.is_finished("auto")  # as if it had been killed before it saved the adapter
        trainer.finish()
        before = contents(tmp_path)
        for max_steps, is_finished in ((3, True), (4, True), (5, False), (-1, False)):
            assert trainer_for(tmp_path, **SAVES | {"max_steps": max_steps}).is_finished("auto") == is_finished
        again = trainer_for(tmp_path, **SAVES)
        again.train(resume_from_checkpoint="auto")
        assert contents(tmp_path) == before
        with pytest.raises(OrdMoEConfigError, match="settings.seed"):
            trainer_for(tmp_path, **SAVES, seed=3).is_finished("auto")
