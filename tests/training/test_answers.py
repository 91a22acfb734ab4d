"""What a training set has to learn from."""

import pytest
from datasets import Dataset

from ordmoe_peft.errors import OrdMoEDataError
from ordmoe_peft.training.answers import has_conversations, with_answers
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


def test_conversations_are_known_by_their_column():
    assert has_conversations(Dataset.from_dict({"messages": [[]]}))
    assert not has_conversations(PROMPTS) and not has_conversations(None)
