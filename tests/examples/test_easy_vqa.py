import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLMoeForConditionalGeneration

from examples.easy_vqa.data import load_easy_vqa, question_kind


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what shape is in the image?", "circle", "shape"),
        ("what is the blue shape?", "rectangle", "shape"),
        ("what color is the circle?", "red", "color"),
        ("is there not a triangle?", "yes", "shape presence"),
        ("is no teal shape present?", "no", "color presence"),
    ],
)
def test_question_kinds(question, answer, kind):
    assert question_kind(question, answer) == kind


def test_splits_are_all_of_easy_vqa_and_share_no_training_image():
    splits = load_easy_vqa()
    assert splits["train"].num_rows + splits["validation"].num_rows == 38_575
    assert splits["test"].num_rows == 9_673
    assert not set(splits["train"]["image_id"]) & set(splits["validation"]["image_id"])
    sample = splits["validation"][0]
    assert sample["images"][0].size == (64, 64)
    assert [message["role"] for message in sample["prompt"] + sample["completion"]] == ["user", "assistant"]


def test_the_shipped_base_loads_from_its_folder():
    model = AutoModelForImageTextToText.from_pretrained("examples/easy_vqa/base")
    assert type(model) is Qwen3VLMoeForConditionalGeneration
    processor = AutoProcessor.from_pretrained("examples/easy_vqa/base")
    assert processor.tokenizer.is_fast
    assert processor.chat_template
    words = ["circle", "rectangle", "triangle", "no", "red", "teal", "yellow"]
    assert all(len(processor.tokenizer(f" {word}").input_ids) == 1 for word in words)
    assert processor.tokenizer.decode(processor.tokenizer("Naïve 日本?").input_ids) == "Naïve 日本?"
