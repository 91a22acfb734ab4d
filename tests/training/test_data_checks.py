"""What cannot be trained on is refused before the first step, with its row or its reason."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from ordmoe_peft import OrdMoETrainer
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError, OrdMoEModelError
from ordmoe_peft.training import data_checks
from ordmoe_peft.training.run_record import RunFolder
from tests import models, text
from tests.training.test_trainer import adapted, arguments, trainer_for


def rows(*completions, prompt="w20 w21"):
    return Dataset.from_dict({"prompt": [prompt] * len(completions), "completion": list(completions)})


NONE = rows("w30").select([])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        (rows("w30", "w31", None), {}, r"Row 2 \(counted from 0\) of the training data set has None in `completion`"),
        (rows("w30", "w31", prompt=None), {}, "Row 0 .* None in `prompt`"),
        (rows("w30", "w31", prompt="w20 " * 9), {"max_length": 8}, "No row is left to train on: max_length=8"),
    ],
    ids=["null completion", "null prompt", "cut"],
)
def test_rows_that_cannot_be_learnt(tmp_path, dataset, changes, message, streaming):
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(OrdMoEDataError, match=message):
        trainer_for(tmp_path, dataset=dataset, **changes).train()
    assert not RunFolder(tmp_path).results


def test_a_conversation_without_an_answer_where_answers_alone_are_learnt(tmp_path):
    user, assistant = ({"role": role, "content": "w30"} for role in ("user", "assistant"))
    dataset = Dataset.from_dict({"messages": [[user, assistant], [user]]})
    with pytest.raises(OrdMoEDataError, match=r"Row 1 .* no message of the assistant, and assistant_only_loss=True"):
        trainer_for(tmp_path, dataset=dataset, assistant_only_loss=True)


def test_no_rows(tmp_path):
    for dataset in (NONE, IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(OrdMoEDataError, match="The training data set has no samples"):
            trainer_for(tmp_path, dataset=dataset)


@pytest.mark.parametrize("empty", ["", [{"role": "assistant", "content": ""}]], ids=["plain", "conversational"])
def test_completions_that_are_all_empty(tmp_path, empty):
    prompt = "w20" if empty == "" else [{"role": "user", "content": "w20"}]
    with pytest.raises(OrdMoEDataError, match="column `completion` of the training data set is empty in all 2 rows"):
        trainer_for(tmp_path, dataset=rows(empty, empty, prompt=prompt))
    generated = {"responses": "generated", "ntp_coef": 0.0, "max_completion_length": 2}
    assert trainer_for(tmp_path, dataset=rows(empty, empty, prompt=prompt), **generated)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("dataset", "message"), [(NONE, "has no samples"), (rows(None), "Row 0 .* of the evaluation"), (rows(""), "empty")]
)
def test_data_sets_for_evaluation(tmp_path, dataset, message, named):
    with pytest.raises(OrdMoEDataError, match=message):
        OrdMoETrainer(
            adapted(),
            args=arguments(tmp_path, eval_strategy="steps"),
            train_dataset=rows("w30"),
            eval_dataset={"held out": dataset} if named else dataset,
            processing_class=text.tokenizer(),
        )


def test_rows_without_a_label(tmp_path):
    """A first label is of no use: nothing comes before it."""
    masked = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[5, -100, -100], [-100] * 3]})
    for dataset in (masked, masked.select([1])):
        with pytest.raises(OrdMoEDataError, match="No row"):
            trainer_for(tmp_path, dataset=dataset)


def test_rows_that_are_left_out_are_counted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(data_checks.logger, "warning", said.append)
    long = Dataset.from_dict({"prompt": ["w20", "w20 " * 9], "completion": [" w30", " w31"]})
    trainer = trainer_for(tmp_path, dataset=long, max_length=8)
    assert len(trainer.train_dataset) == 1
    assert said == ["1 of 2 rows are left out: max_length=8 cuts their whole response."]


class TestPositions:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("prompt_tokens", [2, 14], ids=["whole row", "prompt"])
    def test_longer_rows(self, tmp_path, prompt_tokens, streaming):
        model = adapted(lambda: models.qwen3_moe(max_position_embeddings=12))
        dataset = Dataset.from_dict({"prompt": ["w20 " * prompt_tokens] * 4, "completion": ["w30 " * 12] * 4})
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        # A stream's rows are looked at as they come, before the forward.
        what = "A sample" if streaming else r"Row 0 \(counted from 0\)"
        with pytest.raises(OrdMoEDataError, match=f"{what} has {13 + prompt_tokens} tokens, .* 12 positions"):
            trainer_for(tmp_path, model, dataset=dataset).train()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    @pytest.mark.parametrize("streaming", [False, True])
    def test_responses_to_be_written(self, tmp_path, streaming):
        model = adapted(lambda: models.qwen3_moe(max_position_embeddings=12))
        dataset = Dataset.from_dict({"prompt": ["w20 " * 6] * 4, "completion": ["w30"] * 4})
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        changes = {"responses": "generated", "max_steps": 1}
        with pytest.raises(OrdMoEDataError, match="prompt has 6 tokens and its response may get 7, .* 12 positions"):
            trainer_for(tmp_path, model, dataset=dataset, max_completion_length=7, **changes).train()
        trainer_for(tmp_path, model, dataset=dataset, max_completion_length=6, **changes).train()

    def test_max_length_cuts_them(self, tmp_path):
        model = adapted(lambda: models.qwen3_moe(max_position_embeddings=12))
        dataset = Dataset.from_dict({"prompt": ["w20"] * 4, "completion": [" w30" * 20] * 4})
        trainer_for(tmp_path, model, dataset=dataset, max_length=12, max_steps=1).train()


class TestTrainable:
    @pytest.fixture
    def folder(self, tmp_path):
        adapted().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_an_adapter_for_inference(self, tmp_path, folder):
        model = PeftModel.from_pretrained(models.qwen3_moe(), folder)
        with pytest.raises(OrdMoEConfigError, match="Nothing of the active adapter 'default' is trainable"):
            trainer_for(tmp_path, model).train()
        trainer_for(tmp_path, PeftModel.from_pretrained(models.qwen3_moe(), folder, is_trainable=True)).train()

    def test_a_merged_adapter(self, tmp_path):
        model = adapted()
        model.merge_adapter()
        trainer = trainer_for(tmp_path, model, max_steps=1)
        with pytest.raises(OrdMoEConfigError, match=r"'default' is merged .* Call model.unmerge_adapter\(\)"):
            trainer.train()
        model.unmerge_adapter()
        trainer.train()

    def test_another_adapters_parameters_do_not_count(self, tmp_path, folder):
        model = PeftModel.from_pretrained(models.qwen3_moe(), folder)
        model.load_adapter(folder, "default_2", is_trainable=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default_2." in name)
        with pytest.raises(OrdMoEConfigError, match="'default'"):
            trainer_for(tmp_path, model).train()


def test_a_tokenizer_without_words(tmp_path):
    """What transformers makes of a folder that has none."""
    core = text.Tokenizer(text.models.WordLevel({"</s>": 0}))
    empty = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with pytest.raises(OrdMoEModelError, match="The given processing_class has no tokenizer"):
        OrdMoETrainer(adapted(), args=arguments(tmp_path), train_dataset=text.conversations(), processing_class=empty)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_are_trained_on_as_messages(tmp_path, streaming):
    """TRL would leave the speakers `human` and `gpt`, and takes no column `conversations` with roles."""
    chat = [{"from": "human", "value": "w20"}, {"from": "gpt", "value": "w21 w22"}]
    rows = Dataset.from_list([{"conversations": chat}] * 2)
    rows = data_checks.checked_data(rows.to_iterable_dataset() if streaming else rows, arguments(tmp_path), "training")
    says = [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21 w22"}]
    assert [row["messages"] for row in rows] == [says] * 2


def test_texts_with_images_are_refused(tmp_path):
    rows = Dataset.from_dict({"text": ["w20"], "images": [[]]})
    with pytest.raises(OrdMoEDataError, match="nothing says where in the text an image stands"):
        data_checks.checked_data(rows, arguments(tmp_path), "training")
