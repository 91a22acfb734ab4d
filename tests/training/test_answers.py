"""What a training set has to learn from."""

import pytest
from datasets import Dataset

from ordmoe_peft.errors import OrdMoEDataError
from ordmoe_peft.training import answers
from ordmoe_peft.training.answers import with_answers
from tests.training.test_trainer import arguments


PROMPTS = Dataset.from_dict({"prompt": ["one", "two"]})


def test_answers_stay_as_they_are(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["one"], "completion": ["two"]})
    assert with_answers(dataset, arguments(tmp_path)) is dataset


def test_prompts_alone_get_empty_answers_where_they_suffice(tmp_path):
    args = arguments(tmp_path, responses="generated", ntp_coef=0.0)
    assert with_answers(PROMPTS, args)["completion"] == ["", ""]
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "one"}]]})
    assert with_answers(chat, args)[0]["completion"] == [{"role": "assistant", "content": ""}]


@pytest.mark.parametrize("changes", [{}, {"responses": "generated"}])
def test_prompts_alone_are_refused_where_they_do_not(tmp_path, changes):
    with pytest.raises(OrdMoEDataError, match=r"\['prompt'\], none of which holds an answer"):
        with_answers(PROMPTS, arguments(tmp_path, **changes))


@pytest.mark.parametrize(("assistant_only_loss", "warned"), [(False, 1), (True, 0)])
def test_prompts_that_count_as_answers_are_warned_of(tmp_path, monkeypatch, assistant_only_loss, warned):
    messages = []
    monkeypatch.setattr(answers.logger, "warning", messages.append)
    dataset = Dataset.from_dict({"messages": [[]]})
    assert with_answers(dataset, arguments(tmp_path, assistant_only_loss=assistant_only_loss)) is dataset
    assert len(messages) == warned and all("has whole conversations" in message for message in messages)


@pytest.mark.parametrize("prompt", [{}, {"prompt": ["one"]}])
def test_preferences_are_refused_with_what_to_do(tmp_path, prompt):
    dataset = Dataset.from_dict({**prompt, "chosen": ["two"], "rejected": ["three"]})
    with pytest.raises(OrdMoEDataError, match="has preferences .* rename `chosen` to `completion` beside `prompt`"):
        with_answers(dataset, arguments(tmp_path))
