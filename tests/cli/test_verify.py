"""`ordmoe verify`: exit status 0 on the base of training, 1 on one that answers otherwise, 2 on one that is refused."""

import json

import pytest
import torch
from peft import get_peft_model

from ordmoe import main
from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from tests import models
from tests.test_ordmoe import error_of


@pytest.fixture
def folders(tmp_path):
    base = models.qwen3_moe()
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(type(base).from_pretrained(tmp_path / "base"), OrdMoEConfig(r=4))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path


def verify(folder, *options):
    return main(["verify", str(folder / "adapter"), *map(str, options)])


def test_on_the_base_of_training(folders, capsys):
    assert verify(folders, folders / "base", "--output_file", folders / "out.json") == 0
    assert "verified; the largest median difference of a tier is 0.0000" in capsys.readouterr().out
    assert [row["tier"] for row in json.loads((folders / "out.json").read_text())] == [1, 2, 3]
    assert verify(folders) == 0  # the adapter names it


def test_on_a_base_with_other_experts(folders, capsys):
    other = models.qwen3_moe()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.experts.down_proj *= -1
    other.save_pretrained(folders / "other")
    assert verify(folders, folders / "other") == 1
    assert "NOT what was saved" in capsys.readouterr().out
    assert verify(folders, folders / "other", "--tolerance", 50) == 0


def test_on_a_base_that_is_refused(folders, capsys):
    other = models.qwen3_moe()
    with torch.no_grad():
        other.model.layers[0].mlp.gate.weight *= 2
    other.save_pretrained(folders / "other")
    assert verify(folders, folders / "other") == 2
    assert "another base" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="another base"):
        assert verify(folders, folders / "other", "--ignore_fingerprint", "true", "--tolerance", 9) == 0


def test_the_recipe_of_training_is_taken(folders, capsys):
    base = type(models.qwen3_moe()).from_pretrained(folders / "base")
    recipe = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    tuned = get_peft_model(quantize_experts_(base, recipe), OrdMoEConfig(r=4))
    tuned.save_pretrained(folders / "adapter")
    assert verify(folders) == 0
    with pytest.warns(UserWarning, match="a base that was .*fp4.*; this one is dense"):
        verify(folders, "--load_in_4bit", "false", "--tolerance", 9)


def test_without_probes(folders, capsys):
    record = json.loads((folders / "adapter" / "ordmoe.json").read_text())
    (folders / "adapter" / "ordmoe.json").write_text(json.dumps(record | {"probes": None}))
    assert verify(folders) == 2
    assert "has no probes" in capsys.readouterr().err
    (folders / "adapter" / "ordmoe.json").unlink()
    assert verify(folders) == 2
    assert "has no ordmoe.json, and so no probes" in capsys.readouterr().err
    assert "ADAPTER is missing" in error_of(capsys, ["verify"])
