"""`ordmoe plan` as a user types it."""

import json

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from ordmoe import main
from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.tools.plan import known_models
from tests import models
from tests.test_ordmoe import error_of


def run(*arguments) -> int:
    return main(["plan", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    """A configuration alone, without weights."""
    models.qwen3_moe().to(torch.bfloat16).config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_that_fits(folder, tmp_path, capsys):
    results = tmp_path / "plan.json"
    assert run(folder, "--gpu_memory_gb", 24, "--load_in_4bit", "--max_length", 32, "--output_file", results) == 0
    printed = capsys.readouterr().out
    assert "3 MoE layers, E 8, K 2" in printed
    assert "8 rows of 32 tokens; tiers 1, 3 one after another" in printed
    assert "Fits: " in printed
    assert "tiers of the first batch run one after another, 256 tokens at a time" in printed
    assert "room to run all tiers of a batch in one forward" in printed
    plan = json.loads(results.read_text())
    assert plan["fits"]
    assert plan["suggestions"] == []
    assert {row["dtype"] for row in plan["weights"] if row["role"] == "experts"} == {"nf4"}
    assert plan["tokens_at_once"] > 256
    assert not plan["is_close"]
    assert plan["reserve"] == 2**30
    assert plan["total"] < plan["room"] == plan["usable"] - plan["reserve"]
    assert "a reserve of 1.00 among them, of the 23.51 that programs can have of a card sold as 24 GB" in printed


@pytest.mark.parametrize(("beyond", "begins"), [(0.02, "Fits, but within 3 % of the limit: "), (0.04, "Fits: ")])
def test_near_the_limit_it_says_so(folder, tmp_path, capsys, beyond, begins):
    """The card is made as large as the plan and its share of `beyond`."""
    results = tmp_path / "plan.json"
    arguments = (folder, "--max_length", 16, "--reserve_gb", 0, "--output_file", results)
    run(*arguments)
    capsys.readouterr()
    total = json.loads(results.read_text())["total"]
    run(*arguments, "--usable_gb", total / 2**30 / (1 - beyond))
    printed = capsys.readouterr().out
    plan = json.loads(results.read_text())
    assert begins in printed
    assert plan["fits"]
    is_close = beyond < 0.03
    assert plan["is_close"] == is_close == ("before you rely on it" in printed)
    assert bool(plan["suggestions"]) == is_close, "what gives room is suggested, too"


@pytest.mark.parametrize("bits", ["true", "false"])
@pytest.mark.parametrize("precision", [(), ("--bf16", "false"), ("--fp16",)], ids=["bf16", "none", "fp16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype(folder, capsys, dtype, precision, bits):
    assert run(folder, "--max_length", 16, "--dtype", dtype, "--load_in_4bit", bits, *precision) == 0
    printed = capsys.readouterr().out
    assert "Fits: " in printed
    mixes_16_bits = (dtype, precision) in {("float16", ()), ("bfloat16", ("--fp16",))}
    assert ("Planned without mixed precision" in printed) == (mixes_16_bits and bits == "true")


def test_the_shipped_base(capsys):
    assert run("examples/easy_vqa/base", "--max_length", 64) == 0
    assert "float32" in capsys.readouterr().out


def test_a_model_that_does_not_fit_and_what_would_help(folder, tmp_path, capsys):
    results = tmp_path / "plan.json"
    arguments = ("--usable_gb", 0.05, "--reserve_gb", 0, "--per_device_train_batch_size", 4, "--output_file", results)
    assert run(folder, *arguments, "--tier_passes", "batched") == 0
    printed = capsys.readouterr().out
    assert "Does not fit: " in printed
    assert "tier_passes auto" not in printed
    assert "--tier_passes sequential" in printed
    plan = json.loads(results.read_text())
    assert not plan["fits"]
    assert [way["fits"] for way in plan["suggestions"]][-1]
    assert not any(way["fits"] for way in plan["suggestions"][:-1])
    assert plan["fewest"]["fits"]
    assert f"The fewest that suffice: {plan['fewest']['options']} (" in printed


def test_nothing_makes_it_fit(folder, capsys):
    arguments = ("--usable_gb", 1e-4, "--reserve_gb", 0, "--max_length", 16, "--lora_r", 4, "--expert_rank", "r/K")
    assert run(folder, *arguments) == 0
    printed = capsys.readouterr().out
    assert "Even with all of them it does not fit" in printed
    assert "The fewest" not in printed
    assert "adapter, r 4, of experts r/K" in printed


def test_experts_in_ram(folder, tmp_path, capsys):
    results = tmp_path / "plan.json"
    arguments = ("--load_in_4bit", "--offload_experts", "true", "--max_length", 32, "--copy_gb_per_s", 12)
    assert run(folder, *arguments, "--optim", "adamw_torch", "--output_file", results) == 0
    printed = capsys.readouterr().out
    assert "slots for experts in RAM" in printed
    assert "at an assumed 12 GB/s" in printed
    assert "when these are gone" in printed
    plan = json.loads(results.read_text())
    weights = sum(row["bytes"] for row in plan["weights"])
    assert plan["base"] == weights - plan["in_ram"]["host"] + plan["in_ram"]["slots"]
    assert plan["optimizer_temporaries"] == plan["adapter"]


def test_several_cards_give_a_table(folder, tmp_path, capsys):
    results = tmp_path / "fits.json"
    assert run(folder, "--gpu_memory_gb", 8, 24, "--max_length", 32, "--output_file", results) == 0
    printed = capsys.readouterr().out
    assert "What makes training fit a card: 8 rows of 32 tokens; tiers 1, 3 one after another" in printed
    assert " | fits | fits | — | — |" in (tmp_path / "fits.md").read_text()
    (model,) = json.loads(results.read_text())
    assert [card["sold_gb"] for card in model["cards"]] == [8, 24]
    assert all(card["fits"] and not card["options"] for card in model["cards"])


def test_without_a_model_the_known_ones_are_planned(folder, capsys, monkeypatch):
    names = {name: models.qwen3_moe().config for name in known_models.KNOWN_MODELS}
    monkeypatch.setattr("ordmoe_peft.cli.plan.load_config", lambda name, revision: names.pop(name))
    assert run("--gpu_memory_gb", 16, "--load_in_4bit", "--max_length", 32) == 0
    assert not names
    printed = capsys.readouterr().out
    assert "Mixtral-8x7B" in printed
    assert "16 GB" in printed


def test_a_known_model_needs_no_hub(capsys, monkeypatch):
    monkeypatch.setattr(known_models.AutoConfig, "from_pretrained", None)
    assert (
        run(
            "allenai/OLMoE-1B-7B-0125-Instruct",
            "--load_in_4bit",
            "--per_device_train_batch_size",
            1,
            "--max_length",
            64,
        )
        == 0
    )
    assert "6.92 B weights, 16 MoE layers, E 64, K 8" in capsys.readouterr().out


def test_a_training_recipe(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "lora_r: 4\nerl_coef: 0.1\nrewards: [1, 0.9, 0]\nmax_length: 32\n"
        "per_device_train_batch_size: 1\noptim: adamw_8bit\n"
    )
    assert run(folder, "--config", recipe) == 0
    printed = capsys.readouterr().out
    assert "adapter, r 4" in printed
    assert "1 rows of 32 tokens; tiers 1, 2, 3 one after another" in printed
    assert "adamw_8bit" in printed


def test_images(tmp_path, capsys):
    models.qwen3_vl_moe().config.save_pretrained(tmp_path)
    arguments = ("--images_per_sample", 1, "--image_tokens", 9, "--max_length", 16)
    assert run(tmp_path, *arguments) == 0
    assert "weights: vision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu_memory_gb", 0), "gpu_memory_gb must be positive, got 0"),
        (("--gpu_memory_gb", -24), "gpu_memory_gb must be positive, got -24"),
        (("--gpu_memory_gb", "nan"), "gpu_memory_gb must be positive, got nan"),
        (("--reserve_gb", 24), "reserve_gb must be at least 0 and less than programs can have"),
        (("--reserve_gb", 23.6), "of --gpu_memory_gb 24.0 is 23.51 GiB, got 23.6"),
        (("--usable_gb", 22, "--gpu_memory_gb", 24, 48), "is what one card has, but gpu_memory_gb has 2 sizes"),
        (("--offload_experts", "true"), "set --load_in_4bit true"),
        (("--gpu_memory_gb", 8, 16, "--output_file", "fits.md"), "--output_file fits.md is for JSON"),
        (("--max_length", 0), "sequence_length must be at least 1, got 0"),
        (("--num_tiers", 5), "--num_tiers 5 does not fit"),
        (("--dtype", "int3"), "argument --dtype: invalid choice: 'int3'"),
        (("--images_per_sample", 1, "--image_tokens", 4), "needs a vision tower"),
    ],
)
def test_numbers_that_cannot_be(folder, capsys, options, message):
    assert message in error_of(capsys, ["plan", str(folder), *map(str, options)])


def test_a_model_without_moe_layers(tmp_path, capsys):
    models.qwen3_dense().config.save_pretrained(tmp_path)
    assert "has no MoE layers" in error_of(capsys, ["plan", str(tmp_path)])


def test_an_unknown_model_names_the_known_ones(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled("no hub")

    monkeypatch.setattr(known_models.AutoConfig, "from_pretrained", offline)
    error = error_of(capsys, ["plan", "nobody/nothing"])
    assert "There is no folder 'nobody/nothing' here, and the hub gave no model of this id: no hub" in error
    assert "Qwen3-30B-A3B" in error


def test_a_folder_without_a_configuration(tmp_path, capsys):
    assert f"The folder {str(tmp_path)!r} holds no model" in error_of(capsys, ["plan", str(tmp_path)])


def test_a_checkpoint_that_is_quantised_already(tmp_path, capsys):
    config = models.gpt_oss().config
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    assert "is quantised by 'mxfp4'" in error_of(capsys, ["plan", str(tmp_path)])


def test_a_checkpoint_that_holds_4_bits_of_ours(tmp_path, capsys):
    config = models.qwen3_moe().config
    config.quantization_config = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4").to_dict()
    config.save_pretrained(tmp_path)
    assert run(tmp_path, "--max_length", 16) == 0
    assert "fp4" in capsys.readouterr().out


@pytest.mark.parametrize(("stored", "computed"), [(torch.bfloat16, torch.bfloat16), (None, torch.bfloat16)])
def test_4_bits_compute_in_the_dtype_of_the_model(stored, computed):
    """bitsandbytes' own default is fp32."""
    config = models.qwen3_moe().config
    config.dtype = stored
    quantization = ModelArguments("model", load_in_4bit=True).quantization_config(config)
    assert quantization.bnb_4bit_compute_dtype == computed
    asked = ModelArguments("model", load_in_4bit=True, dtype="bfloat16", bnb_4bit_compute_dtype="float16")
    assert asked.quantization_config(config).bnb_4bit_compute_dtype == torch.float16
