import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_dataset
from peft import get_peft_model
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.data.preference_pairs import to_preference_pairs
from ordmoe_peft.data.rollouts import rollout
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError
from tests import models, text


TOKENIZER = text.tokenizer()
BASE = Path(__file__).parents[2] / "examples/easy_vqa/base"
SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 5}


def rollouts_of(*responses: list[str], prompt=None) -> Dataset:
    prompt = prompt or [{"role": "user", "content": "w10"}]
    return Dataset.from_list(
        [{"prompt": prompt, "tiers": [1, 2, 4], "responses": texts, "completion": "w1"} for texts in responses]
    )


def texts_of(pairs: Dataset) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs]


def test_the_ends_make_a_pair():
    pairs = to_preference_pairs(rollouts_of(["a", "b", "c"], ["d", "d", "e"]))
    assert texts_of(pairs) == [("a", "c"), ("d", "e")]
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected", "chosen_tier", "rejected_tier"}
    assert pairs[0]["prompt"] == [{"role": "user", "content": "w10"}]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "a"}]
    assert (pairs[0]["chosen_tier"], pairs[0]["rejected_tier"]) == (1, 4)


def test_all_pairs_put_higher_tiers_first_and_leave_equal_texts_out(caplog):
    rollouts = rollouts_of(["a", "b", "c"], ["d", " d", "e"])
    pairs = to_preference_pairs(rollouts, pairs="all")
    assert texts_of(pairs) == [("a", "b"), ("a", "c"), ("b", "c"), ("d", "e"), ("d", "e")]
    assert pairs["chosen_tier"][:] == [1, 1, 2, 1, 2]
    assert pairs["rejected_tier"][:] == [2, 4, 4, 4, 4]
    assert "Left out 1 of 6 pairs" in caplog.text
    assert len(to_preference_pairs(rollouts, pairs="all", drop_equal=False)) == 6


def test_plain_prompts_keep_plain_texts():
    pairs = to_preference_pairs(rollouts_of([" a", " b", " a"], prompt="w10 w11"), rejected_tier=2)
    assert pairs[0] == {
        "prompt": "w10 w11",
        "chosen": " a",
        "rejected": " b",
        "chosen_tier": 1,
        "rejected_tier": 2,
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rejected_tier": 3}, OrdMoEConfigError, r"rejected_tier=3, but the rollouts are of tiers \[1, 2, 4\]"),
        ({"chosen_tier": 4}, OrdMoEConfigError, "must be a lower tier"),
        ({"pairs": "some"}, OrdMoEConfigError, "got 'some'"),
        ({"rejected_tier": 2}, OrdMoEDataError, "All 1 pairs have equal texts"),
        ({"dataset": text.conversations(2)}, OrdMoEDataError, "no rollouts"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_pairs_that_cannot_be(changes, error, message):
    dataset = changes.pop("dataset", rollouts_of(["a", "a", "b"]))
    with pytest.raises(error, match=message):
        to_preference_pairs(dataset, **changes)


def train_dpo(model, processing_class, pairs, output) -> None:
    """Two steps of TRL's trainer; the first loss is ln 2, since policy and reference are still the same."""
    arguments = DPOConfig(
        str(output),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        router_aux_loss_coef=0.0,
    )
    trainer = DPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=processing_class)
    weights = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in weights.items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert len(losses) == 2 and math.isfinite(losses[1]) and losses[1] != losses[0]
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert {"gate.lora_B", "experts.lora_B"} <= {".".join(name.split(".")[-4:-2]) for name in moved}


def test_dpo_trains_on_pairs(tmp_path):
    pairs = to_preference_pairs(
        rollout(models.qwen3_moe(), TOKENIZER, text.conversations(6), tmp_path / "rollouts", **SAMPLED)
    )
    assert len(pairs) >= 4
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    train_dpo(model, TOKENIZER, pairs, tmp_path / "dpo")


def image_questions(count: int) -> Dataset:
    colors = ("red", "blue", "green", "teal")
    rows = [
        {
            "images": [PILImage.new("RGB", (64, 64), colors[index % len(colors)])],
            "prompt": [{"role": "user", "content": "what shape is in the image?"}],
        }
        for index in range(count)
    ]
    messages = List({"role": Value("string"), "content": Value("string")})
    return Dataset.from_list(rows, features=Features({"images": List(Image()), "prompt": messages}))


def test_images_are_kept_and_dpo_trains_on_them(tmp_path):
    model, processor = AutoModelForImageTextToText.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE)
    dataset = image_questions(8)
    rollouts = rollout(model, processor, dataset, tmp_path / "rollouts", samples_per_shard=4, **SAMPLED)
    read = load_dataset(str(tmp_path / "rollouts"), split="train")
    assert read.features["images"] == dataset.features["images"]
    assert [row["images"][0].getpixel((5, 5)) for row in read] == [row["images"][0].getpixel((5, 5)) for row in dataset]
    assert rollouts["responses"][:] == read["responses"][:]
    pairs = to_preference_pairs(rollouts)
    assert pairs.features["images"] == dataset.features["images"]
    train_dpo(get_peft_model(model, OrdMoEConfig(r=4)), processor, pairs, tmp_path / "dpo")
