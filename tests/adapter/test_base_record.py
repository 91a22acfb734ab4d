"""What an adapter remembers of its base: what makes two bases two, and what does not."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.adapter.base_record import base_record, hub_id
from ordmoe_peft.errors import OrdMoEModelError
from tests import models
from tests.adapter.test_attachment import State


def in_4_bits(**options):
    return quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig(**options))


def with_other_routers():
    model = models.qwen3_moe()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0] *= 1.02
    return model


def with_other_embeddings():
    model = models.qwen3_moe()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] += 1
    return model


def with_weights_not_renormalised():
    model = models.qwen3_moe()
    model.config.norm_topk_prob = False
    return model


def with_another_theta():
    model = models.qwen3_moe()
    model.config.rope_parameters["rope_theta"] = 5.0
    return model


def with_a_larger_vocabulary():
    model = models.qwen3_moe()
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 4)
    return model


@pytest.fixture
def adapter(tmp_path):
    def save(base):
        get_peft_model(base, OrdMoEConfig(r=4)).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.mark.parametrize(
    ("make", "difference"),
    [
        (with_other_routers, "its routers have other weights"),
        (with_other_embeddings, "its embeddings have other weights"),
        (with_weights_not_renormalised, r"its norm_topk_prob is True \(this model: False\)"),
        (with_another_theta, r"its rope_parameters.rope_theta is 10000.0 \(this model: 5.0\)"),
        (with_a_larger_vocabulary, r"its vocab_size is 96 \(this model: 100\)"),
    ],
)
def test_another_base_is_refused_or_warned_of(make, difference, adapter):
    folder = adapter(models.qwen3_moe())
    model = make()
    before = State(model)
    with pytest.raises(OrdMoEModelError, match=f"another base.*{difference}.*ignore_fingerprint=True"):
        PeftModel.from_pretrained(model, folder)
    before.check()
    with pytest.warns(UserWarning, match=difference):
        tuned = PeftModel.from_pretrained(model, folder, ignore_fingerprint=True)
    with pytest.raises(OrdMoEModelError, match=difference):
        tuned.load_adapter(folder, "second")
    assert list(tuned.peft_config) == ["default"]
    with pytest.warns(UserWarning, match=difference):
        tuned.load_adapter(folder, "second", ignore_fingerprint=True)
    with pytest.raises(OrdMoEModelError, match=difference):  # asked for once is not asked for ever
        tuned.load_adapter(folder, "third")
    with pytest.raises(OrdMoEModelError, match=difference):  # into one that is there
        tuned.load_adapter(folder, "second")


@pytest.mark.parametrize("other", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": True}])
def test_another_recipe_is_refused(other, adapter):
    folder = adapter(in_4_bits())
    with pytest.raises(OrdMoEModelError, match=f"it was quantised .*{next(iter(other))}"):
        PeftModel.from_pretrained(in_4_bits(**other), folder)


def test_dense_against_4_bits_is_a_warning(adapter):
    folder = adapter(in_4_bits())
    with pytest.warns(UserWarning, match="a base that was .*nf4.*; this one is dense.*ordmoe verify"):
        PeftModel.from_pretrained(models.qwen3_moe(), folder)
    folder = adapter(models.qwen3_moe())
    with pytest.warns(UserWarning, match="a base that was dense; this one is .*nf4"):
        PeftModel.from_pretrained(in_4_bits(), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_weights_in_another_dtype_are_the_same_base(dtype, adapter):
    checkpoint = models.qwen3_moe().to(torch.bfloat16)  # as most are stored
    folder = adapter(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter in")
        PeftModel.from_pretrained(models.qwen3_moe().to(torch.bfloat16).to(dtype), folder)


def test_a_dtype_in_which_the_same_checkpoint_has_other_weights_is_named(adapter):
    folder = adapter(models.qwen3_moe().to(torch.bfloat16))
    model = models.qwen3_moe().to(torch.float16)  # of a checkpoint in float32
    model.config.dtype = torch.float16
    edited = json.loads((folder / "ordmoe.json").read_text())
    edited["base"]["config"]["dtype"] = "bfloat16"
    (folder / "ordmoe.json").write_text(json.dumps(edited))
    with pytest.raises(OrdMoEModelError, match="float32 has others in float16 than in bfloat16.*load it so"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("trained", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [96, 97]}])
def test_embeddings_that_the_adapter_brings_are_not_compared(trained, tmp_path):
    def with_new_tokens(seed):
        model = models.qwen3_moe()
        torch.manual_seed(seed)
        model.resize_token_embeddings(98)
        return model

    get_peft_model(with_new_tokens(1), OrdMoEConfig(r=4, **trained)).save_pretrained(tmp_path)
    assert isinstance(PeftModel.from_pretrained(with_new_tokens(2), tmp_path), PeftModel)
    other = with_new_tokens(2)
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight[0] *= 1.02
    with pytest.raises(OrdMoEModelError, match="its routers have other weights"):
        PeftModel.from_pretrained(other, tmp_path)


def test_what_does_not_change_a_forward_is_not_compared(adapter):
    folder = adapter(models.qwen3_moe())
    model = models.qwen3_moe()
    model.config.use_cache, model.config.attention_dropout, model.config.pad_token_id = False, 0.3, 7
    model.config.name_of_a_newer_version = 1
    assert isinstance(PeftModel.from_pretrained(model, folder), PeftModel)


def test_another_commit_of_the_same_routers_is_a_warning(adapter):
    base = models.qwen3_moe()
    base.config._commit_hash = "1" * 40
    folder = adapter(base)
    other = models.qwen3_moe()
    other.config._commit_hash = "2" * 40
    with pytest.warns(UserWarning, match="trained on revision 1111.* this is 2222.*experts were not compared"):
        PeftModel.from_pretrained(other, folder)


def test_a_second_adapter_is_on_the_same_base(adapter):
    folder = adapter(models.qwen3_moe())
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    models.randomize_adapter(tuned)  # its factors are none of the base's weights
    tuned.load_adapter(folder, "second")
    assert base_record(models.qwen3_moe())["digest"] == tuned.base_model.base_record["digest"]


def test_a_model_without_numbers_has_no_digest():
    assert base_record(models.qwen3_moe().to("meta"))["digest"] == {"routers": None, "embeddings": None}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen3-30B-A3B", ("Qwen/Qwen3-30B-A3B", None)),
        ("gpt2", ("gpt2", None)),
        (f"/x/hub/models--Qwen--Q.3/snapshots/{'a1' * 20}", ("Qwen/Q.3", "a1" * 20)),
        ("/home/someone/models/qwen", (None, None)),
        ("./qwen", (None, None)),
        ("examples/easy_vqa/base", (None, None)),
        ("tests", (None, None)),  # a folder of this name is there
        ("", (None, None)),
    ],
)
def test_ids_on_the_hub(name, found):
    assert hub_id(name) == found
