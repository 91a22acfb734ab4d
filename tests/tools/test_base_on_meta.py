"""The base of an adapter, without weights."""

from pathlib import Path

import pytest

from ordmoe_peft.adapter.saved import SavedAdapter
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.base_on_meta import base_on_meta
from tests import models


def adapter(record=None, **settings):
    return SavedAdapter(Path("adapter"), settings, record)


def test_the_record_is_enough_and_a_name_goes_before_it(tmp_path):
    record = {"base": {"class": "GptOssForCausalLM", "config": models.gpt_oss().config.to_dict(), "id": None}}
    from_record = base_on_meta(adapter(record))
    assert type(from_record).__name__ == "GptOssForCausalLM" and from_record.device.type == "meta"
    assert from_record.config.num_local_experts == models.NUM_EXPERTS
    record["base"]["config"]["swiglu_limit"] = {"__float__": "Infinity"}
    assert base_on_meta(adapter(record)).config.swiglu_limit == float("inf")
    models.qwen3_moe().save_pretrained(tmp_path)
    assert type(base_on_meta(adapter(record), str(tmp_path))).__name__ == "Qwen3MoeForCausalLM"
    named = adapter(base_model_name_or_path=str(tmp_path))
    assert type(base_on_meta(named)).__name__ == "Qwen3MoeForCausalLM"


def test_an_adapter_that_names_no_base():
    with pytest.raises(OrdMoEConfigError, match="adapter does not say what its base is: give `base`"):
        base_on_meta(adapter())
