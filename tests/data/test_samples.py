"""Samples as model inputs."""

import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from ordmoe_peft.data.samples import (
    answer_text,
    check_counts,
    check_processing_class,
    prompt_inputs,
    sample_batches,
    sample_images,
    scoring_inputs,
    subsample,
)
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError, OrdMoEModelError
from tests import models, text


TOKENIZER = text.tokenizer()
ROWS = Dataset.from_dict({"place": list(range(10))})


def test_prompts_end_where_answers_begin():
    """Prompts are padded on the left; what is scored begins with the same tokens and goes on with the labels."""
    samples = list(text.conversations(3))
    prompts, scored = prompt_inputs(samples, TOKENIZER), scoring_inputs(samples, TOKENIZER)
    for row in range(3):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        whole = scored["input_ids"][row][scored["attention_mask"][row].bool()]
        labels = scored["labels"][row][scored["attention_mask"][row].bool()]
        assert torch.equal(whole[: len(prompt)], prompt)
        assert (labels[: len(prompt)] == -100).all()
        assert torch.equal(labels[len(prompt) :], whole[len(prompt) :])


@pytest.mark.parametrize("completion", ["w2 w3", f"w2 w3{TOKENIZER.eos_token}"])
def test_plain_answers_end_once(completion):
    scored = scoring_inputs([{"prompt": "w1 ", "completion": completion}], TOKENIZER)
    assert (scored["labels"][0] == models.EOS).sum() == 1
    assert scored["labels"][0, -1] == models.EOS


@pytest.mark.parametrize(
    "completion",
    [" yes ", [{"role": "assistant", "content": "yes"}], [{"content": [{"type": "text", "text": "yes"}]}]],
)
def test_the_answer_as_plain_text(completion):
    assert answer_text({"completion": completion}) == "yes"


def test_images_of_a_sample():
    assert [sample_images(sample) for sample in ({"image": 1}, {"images": (1, 2)}, {"images": None}, {})] == [
        *([1], [1, 2], [], [])
    ]


def test_batches_are_in_order():
    assert [[row["place"] for row in batch] for batch in sample_batches(ROWS, 4)] == [
        *([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])
    ]


def test_a_subsample_follows_its_seed():
    assert subsample(ROWS, None) is ROWS
    assert len(subsample(ROWS, 99)) == 10
    assert subsample(ROWS, 4)["place"][:] == subsample(ROWS, 4)["place"][:] != subsample(ROWS, 4, 1)["place"][:]
    with pytest.raises(OrdMoEConfigError, match="limit must be at least 1, got 0"):
        subsample(ROWS, 0)


def test_counts():
    check_counts(given=1, not_given=None)
    with pytest.raises(OrdMoEConfigError, match="rows must be at least 1, got -1"):
        check_counts(rows=-1)


def test_a_tokenizer_without_words_is_none():
    check_processing_class(TOKENIZER, "base")
    with pytest.raises(OrdMoEModelError, match="base has no tokenizer, only object without a vocabulary"):
        check_processing_class(object(), "base")


def test_rows_without_an_image_are_scored_beside_rows_with_one():
    processor = AutoProcessor.from_pretrained("examples/easy_vqa/base")
    image = PIL.Image.new("RGB", (64, 64))
    prompt, completion = [{"role": "user", "content": "why"}], [{"role": "assistant", "content": "so"}]
    samples = [{"images": images, "prompt": prompt, "completion": completion} for images in ([image], [])]
    both = scoring_inputs(samples, processor)
    for row, sample in enumerate(samples):
        alone = scoring_inputs([sample], processor)
        is_token = both["attention_mask"][row].bool()
        assert torch.equal(both["input_ids"][row][is_token], alone["input_ids"][0])
        assert torch.equal(both["labels"][row][is_token], alone["labels"][0])


def test_images_for_a_base_of_text():
    sample = {"image": object(), "prompt": "w1", "completion": "w2"}
    for make in (prompt_inputs, scoring_inputs):
        with pytest.raises(OrdMoEDataError, match=r"have images, and the base reads text alone"):
            make([sample], TOKENIZER)


def test_tools_are_in_the_prompt():
    tokenizer = text.tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}" + text.TEMPLATE
    sample = text.conversations(1)[0]
    for tools in ([{"name": "w50"}], '[{"name": "w50"}]'):
        for make in (prompt_inputs, scoring_inputs):
            assert tokenizer.decode(make([sample | {"tools": tools}], tokenizer)["input_ids"][0]).startswith(
                "w50 <user>"
            )


def test_a_text_without_a_prompt_is_scored_whole():
    scored = scoring_inputs([{"prompt": "", "completion": "w20 w21"}, {"prompt": "", "completion": "w22"}], TOKENIZER)
    assert scored["input_ids"].dtype == scored["labels"].dtype == torch.long
    assert scored["labels"].tolist() == [[20, 21, models.EOS], [22, models.EOS, -100]]
