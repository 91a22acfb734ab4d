import pytest
import torch

from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.cli.loading import chosen_split, load_base, load_split
from ordmoe_peft.errors import OrdMoEDataError
from ordmoe_peft.quantization.offloaded import is_in_ram
from tests import models


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


@pytest.mark.parametrize(
    ("there", "chosen"), [(("train", "validation", "test"), "test"), (("train", "validation"), "validation")], ids=str
)
def test_the_split_that_is_taken_where_none_is_named(tmp_path, there, chosen):
    for name in there:
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    assert chosen_split(str(tmp_path), None, ("test", "validation")) == chosen
    assert chosen_split(str(tmp_path), None, ("train",)) == "train"
    with pytest.raises(OrdMoEDataError, match="has the splits .*train.*: give --dataset_split"):
        chosen_split(str(tmp_path), None, ("dev",))


def test_the_only_split_is_taken(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    assert chosen_split(str(tmp_path), None, ("test",)) == "train"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file_is_a_split_without_samples(tmp_path, streaming):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(OrdMoEDataError, match=f"The split 'train' of the data set {tmp_path} has no samples"):
        load_split(str(tmp_path), None, "train", streaming)
