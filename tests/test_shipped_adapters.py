"""The adapters that ship: on the shipped base each does what its card says, and no file says where it was made."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.easy_vqa.data import load_easy_vqa
from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.adapter.probes import replay
from ordmoe_peft.adapter.saved import SavedAdapter
from ordmoe_peft.data.samples import subsample
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers


ADAPTERS = Path("adapters")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "ordmoe.json"]


@pytest.fixture(scope="module")
def questions():
    return subsample(load_easy_vqa()["test"], 1000)


def load(name):
    saved = SavedAdapter.read(ADAPTERS / name)
    base = saved.settings["base_model_name_or_path"]
    recipe = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype="float32")
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=recipe)
    return PeftModel.from_pretrained(model, saved.folder), AutoProcessor.from_pretrained(base)


@pytest.mark.parametrize("name", ["easy-vqa-ordmoe", "easy-vqa-sft"])
def test_accuracy_and_likelihood_are_those_of_the_card(name, questions):
    base, whole, part = SavedAdapter.read(ADAPTERS / name).record["training"]["evaluations"]
    card = ModelCard.load(ADAPTERS / name / "README.md")
    [stated] = card.data.eval_results
    assert (stated.metric_type, stated.metric_value) == ("exact_match", whole["metrics"]["accuracy"])
    for evaluation in (base, whole, part):
        assert f"| {100 * evaluation['metrics']['accuracy']:.1f} % |" in card.text
    assert [one["rows"] for one in (base, whole, part)] == [1000, 1000, 250]
    assert [one["of"] for one in (base, whole, part)] == ["base", "adapter", "adapter"]

    model, processor = load(name)
    asked = questions.select(range(0, 1000, 4))  # `every 4th of these`
    [found] = evaluate_tiers(model, processor, asked, batch_size=128, max_new_tokens=4)
    # Another CPU rounds otherwise, which may turn an answer that is on the edge.
    assert abs(found.accuracy["overall"] - part["metrics"]["accuracy"]) * part["rows"] < 1.5
    probes = SavedAdapter.read(ADAPTERS / name).record["probes"]
    replayed = replay(model, probes["token_ids"], len(probes["log_probs"]))
    for tier, log_probs in probes["log_probs"].items():
        means = [torch.tensor(values).mean().item() for values in (replayed[tier], log_probs)]
        assert means[0] == pytest.approx(means[1], abs=0.02)
    assert found.log_likelihood == pytest.approx(part["metrics"]["tier_1/log_likelihood"], abs=2e-3)


@pytest.mark.parametrize("name", ["easy-vqa-ordmoe", "easy-vqa-sft"])
def test_its_files_are_whole_and_name_no_machine(name):
    folder = ADAPTERS / name
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    for path in folder.iterdir():
        assert not re.search(rb"/(home|root|work|tmp|Users|usr|opt|mnt)/|[A-Z]:\\\\", path.read_bytes()), path
    saved = SavedAdapter.read(folder)
    saved.check_checksum()
    assert saved.settings["base_model_name_or_path"] == "examples/easy_vqa/base"
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["peft", "ordmoe", "mixture-of-experts"]
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-text-to-text")
    assert '    "examples/easy_vqa/base", dtype="float32", quantization_config=in_4_bits\n' in card.text


def test_tiers_of_the_two():
    """The one was trained to tell tiers apart, the other was not, and their records say so."""
    gaps = {}
    for name in ("easy-vqa-ordmoe", "easy-vqa-sft"):
        training = json.loads((ADAPTERS / name / "ordmoe.json").read_text())["training"]
        base, adapter, _ = (evaluation["metrics"] for evaluation in training["evaluations"])
        gaps[name] = base["tier_3/log_likelihood"] - adapter["tier_3/log_likelihood"]
    assert gaps["easy-vqa-ordmoe"] > 5
    assert abs(gaps["easy-vqa-sft"]) < 1
