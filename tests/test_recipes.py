"""Each recipe parses, and its settings train a tiny model of its class."""

from pathlib import Path

import pytest
import torch
import yaml

from examples.easy_vqa.data import load_easy_vqa
from ordmoe import main
from tests import models, text


RECIPES = sorted(Path("examples/recipes").glob("*.yaml"))
ABLATIONS = [*sorted(Path("examples/easy_vqa/ablations").glob("*.yaml")), Path("examples/reasoning/ablation.yaml")]
BASE = Path("examples/easy_vqa/base")
STAND_INS = {"olmoe_1b_7b": models.olmoe, "gpt_oss_20b": models.gpt_oss, "reasoning": models.qwen3_moe}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_trains_a_stand_in(recipe, tmp_path):
    if recipe.stem in STAND_INS:
        base = tmp_path / "base"
        STAND_INS[recipe.stem]().save_pretrained(base)
        text.tokenizer().save_pretrained(base)
        dataset = text.conversations()
    else:
        base, dataset = BASE, load_easy_vqa()["train"].select(range(8))
    data = tmp_path / "data"
    data.mkdir()
    dataset.to_parquet(data / "train.parquet")
    changes = {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
    }
    if not torch.cuda.is_available():
        changes["optim"] = "adamw_torch"  # bitsandbytes' 8-bit optimizers need a GPU
    options = [str(part) for name, value in changes.items() for part in (f"--{name}", value)]
    assert main(["train", "--config", str(recipe), *options]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("recipe", ABLATIONS, ids=lambda recipe: f"{recipe.parent.name}-{recipe.stem}")
def test_ablation_is_planned_without_a_note_on_its_settings(recipe, tmp_path, capsys):
    assert main(["ablate", "--config", str(recipe), "--output_dir", str(tmp_path), "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert "runs remain" in printed
    assert "Note" not in printed


def test_there_is_a_recipe_for_each_promised_model():
    names = {yaml.safe_load(recipe.read_text())["model_name_or_path"] for recipe in RECIPES}
    assert {
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "allenai/OLMoE-1B-7B-0125-Instruct",
        "lmsys/gpt-oss-20b-bf16",
        "outputs/reasoning/base",
        str(BASE),
    } == names
