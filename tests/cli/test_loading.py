import json
import pickle

import PIL.Image
import pytest
import torch

from ordmoe import main
from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.cli.loading import load_base
from ordmoe_peft.data.loading import load_data
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.offloaded import is_in_ram
from tests import models, text
from tests.test_ordmoe import base  # noqa: F401 (fixture)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"bnb_4bit_compute_dtype": "float16"}, torch.float16),
    ],
    ids=str,
)
def test_4_bit_weights_are_computed_in_the_models_dtype_unless_told_otherwise(options, wanted, tmp_path):
    models.qwen3_vl_moe().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_base(ModelArguments(str(tmp_path), load_in_4bit=True, **options), trust_remote_code=False)
    assert model.config.quantization_config.bnb_4bit_compute_dtype == wanted
    assert model.model.language_model.layers[0].mlp.experts.down_proj.quant_state.dtype == wanted


@pytest.mark.parametrize("stored", ["dense", "packed"])
def test_experts_stay_in_ram_where_that_is_asked_for(stored, tmp_path):
    models.qwen3_moe().save_pretrained(tmp_path)
    if stored == "packed":
        load_base(ModelArguments(str(tmp_path), load_in_4bit=True), False).save_pretrained(tmp_path)
    for in_ram in (True, False):
        model = load_base(ModelArguments(str(tmp_path), load_in_4bit=True, offload_experts=in_ram), False)
        assert is_in_ram(model.model.layers[0].mlp.experts.down_proj) == in_ram


FORMATS = {
    "messages": lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    },
    "conversations": lambda question, answer: {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    },
    "text": lambda question, answer: {"text": f"{question} {answer}"},
}


def as_pairs(question, answer):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def measured(base, folder, convert, command, *arguments):  # noqa: F811
    """What a command writes about four questions in the format of `convert`."""
    rows = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in text.conversations(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(convert(*row)) + "\n" for row in rows))
    output = folder / command
    written = "--output_dir" if command == "rollouts" else "--output_file"
    shared = [base, "--dataset_name", folder / "data.jsonl", written, output]
    assert main([command, *map(str, (*shared, *arguments))]) == 0
    return load_data(output) if command == "rollouts" else json.loads(output.read_text())


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_file_of_each_format_serves_every_command(data_format, base, tmp_path, capsys):  # noqa: F811
    """A conversation is measured like its prompt and completion; a text is scored whole, and nothing is generated."""
    convert, is_text = FORMATS[data_format], data_format == "text"
    (tmp_path / "pairs").mkdir()
    evaluate = ("evaluate", "--tiers", 1, 2, "--max_new_tokens", 2)
    ours, pairs = measured(base, tmp_path, convert, *evaluate), measured(base, tmp_path / "pairs", as_pairs, *evaluate)
    printed = capsys.readouterr().out
    assert "on 4 samples of train" in printed
    assert (ours == pairs) != is_text
    assert ("nothing is answered" in printed) == is_text
    if is_text:
        assert [(tier["accuracy"], tier["items"]["answers"]) for tier in ours] == [({}, [])] * 2
        assert ours[0]["log_likelihood"] != ours[1]["log_likelihood"]
    report = ("--report", tmp_path / "report") if is_text else ()
    quality = measured(base, tmp_path, convert, "tiers", "--max_new_tokens", 2, *report)
    assert quality["tiers"][1]["log_likelihood"] == ours[1]["log_likelihood"]
    assert len(quality["texts"]) == (0 if is_text else 4)
    tokens = measured(base, tmp_path, convert, "inspect")["num_tokens"]
    assert (tokens == measured(base, tmp_path / "pairs", as_pairs, "inspect")["num_tokens"]) != is_text
    rollouts = ("rollouts", "--max_completion_length", 2)
    if is_text:
        arguments = [
            "--model_name_or_path",
            base,
            "--dataset_name",
            tmp_path / "data.jsonl",
            "--output_dir",
            tmp_path / "r",
        ]
        assert main(["rollouts", *map(str, arguments)]) == 2
        assert "without prompts: there is nothing that a tier can answer" in capsys.readouterr().err
    else:
        ours, pairs = (
            measured(base, tmp_path, convert, *rollouts),
            measured(base, tmp_path / "pairs", as_pairs, *rollouts),
        )
        assert [row["responses"] for row in ours] == [row["responses"] for row in pairs]
        assert ours["completion"][:] == pairs["completion"][:]


def test_images_and_a_base_of_text(base, tmp_path, capsys):  # noqa: F811
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "a.png", **as_pairs("w20", "w21")}) + "\n")
    shared = ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "data.jsonl")]
    for command in ("evaluate", "inspect"):
        assert main([command, *shared]) == 2
        assert "The samples have images, and the base reads text alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No data set: give --dataset_name, a file, a folder or a hub id."),
        (["--dataset_name", "data.jsonl"], "There is no file or folder data.jsonl."),
        (
            ["--dataset_name", "examples/quickstart", "--dataset_split", "dev"],
            "has no split 'dev'; it has 'test', 'train'",
        ),
    ],
)
def test_data_that_is_not_there(arguments, message, capsys):
    assert main(["evaluate", "--model_name_or_path", "/no/such/model", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["cut", "pointer", "pickle"])
def test_weights_that_cannot_be_read(tmp_path, broken):
    models.qwen3_moe().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if broken == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif broken == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        weights.unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": pytest.fail}))
    with pytest.raises(OrdMoEModelError, match=f"The weights of {tmp_path} cannot be read") as error:
        load_base(ModelArguments(model_name_or_path=str(tmp_path)), trust_remote_code=False)
    assert len(str(error.value).splitlines()) == 1


def test_weights_of_another_shape_than_the_configuration_says(tmp_path):
    models.qwen3_moe().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(OrdMoEModelError, match="have other shapes than its config.json says"):
        load_base(ModelArguments(model_name_or_path=str(tmp_path)), trust_remote_code=False)
