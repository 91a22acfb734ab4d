import pytest
from datasets import Dataset, Features, Json, List

from ordmoe_peft.data.formats import as_messages, as_prompt_completion, check_images_go_with, has_prompts
from ordmoe_peft.errors import OrdMoEDataError


def says(role, content):
    return {"role": role, "content": content}


ONE = [
    says("system", "be brief"),
    says("user", "why"),
    says("assistant", "so"),
    says("user", "and"),
    says("assistant", "x"),
]
SHAREGPT = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
CHAT = [says("user", "why"), says("assistant", "so")]


@pytest.mark.parametrize(
    ("column", "messages", "prompt", "completion"),
    [
        ("messages", ONE, ONE[:-1], ONE[-1:]),
        ("conversations", CHAT, CHAT[:1], CHAT[1:]),
        ("conversations", SHAREGPT, CHAT[:1], CHAT[1:]),
    ],
)
def test_the_last_message_is_the_answer(column, messages, prompt, completion):
    rows = as_prompt_completion(Dataset.from_list([{column: messages, "kind": "a"}]), needs_answers=True)
    assert rows[0] == {"kind": "a", "prompt": prompt, "completion": completion}
    assert as_prompt_completion(rows) is rows


def test_conversations_without_an_answer():
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}])
    with pytest.raises(OrdMoEDataError, match=r"Row 1 \(counted from 0\) ends without a message of the assistant"):
        as_prompt_completion(rows, needs_answers=True)
    assert as_prompt_completion(rows)["completion"][:] == [CHAT[1:], None]
    assert as_prompt_completion(rows)["prompt"][:] == [CHAT[:1]] * 2
    assert as_prompt_completion(rows.select([1])).column_names == ["prompt"]
    with pytest.raises(OrdMoEDataError, match=r"Row 0 \(counted from 0\) has an answer, and nothing before it"):
        as_prompt_completion(Dataset.from_list([{"messages": CHAT[1:]}]))


def test_messages_of_several_shapes():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    messages = [says("user", [{"type": "image"}, {"type": "text", "text": "why"}]), call, says("tool", "4"), *CHAT]

    rows = Dataset.from_dict({"messages": [messages]}, features=Features({"messages": List(Json())}))
    assert as_prompt_completion(rows)[0] == {"prompt": messages[:-1], "completion": messages[-1:]}


def test_text_is_scored_whole():
    rows = as_prompt_completion(Dataset.from_dict({"text": ["a b", "c"]}), needs_answers=True)
    assert list(rows) == [{"completion": "a b", "prompt": ""}, {"completion": "c", "prompt": ""}]
    assert not has_prompts(rows)
    with pytest.raises(OrdMoEDataError, match=r"Row 1 \(counted from 0\) is empty, so there is nothing to score"):
        as_prompt_completion(Dataset.from_dict({"text": ["a", " "]}))
    other = Dataset.from_dict({"question": ["a"]})
    assert as_prompt_completion(other) is other


def test_an_empty_prompt_among_others_is_named():
    assert has_prompts(Dataset.from_dict({"prompt": ["a", "b"]}))
    with pytest.raises(OrdMoEDataError, match=r"Row 1 \(counted from 0\) has an empty `prompt`"):
        has_prompts(Dataset.from_dict({"prompt": ["a", ""]}))


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_become_messages(streaming):
    rows = Dataset.from_list([{"conversations": SHAREGPT, "kind": "a"}])
    rows = as_messages(rows.to_iterable_dataset() if streaming else rows)
    assert list(rows) == [{"kind": "a", "messages": CHAT}]
    assert as_messages(rows) is rows


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text", "image"], "`text` and images in `image`: nothing says where in the text an image stands"),
        (["messages", "tools", "images"], "`tools` and images in `images`"),
        (["messages", "image", "images"], "images in `image` and in `images`"),
    ],
)
def test_what_does_not_go_with_images(columns, message):
    with pytest.raises(OrdMoEDataError, match=message):
        check_images_go_with(columns)
    check_images_go_with(["messages", "text", "image"])
    check_images_go_with(["prompt", "tools"])
