"""What servers take of which class."""

import pytest
import transformers

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.export.servers import FORMATS, SERVED, served


def test_the_table_names_classes_forms_and_sources():
    for base_class, row in SERVED.items():
        assert hasattr(transformers, base_class)
        assert set(row) <= set(FORMATS) and all(entry.source for entry in row.values())
        assert not {"vllm-3d", "vllm-2d"} <= set(row), "vLLM has one form for a class"
        assert not row.get("sglang", served("OlmoeForCausalLM", "vllm-2d")).router or "sglang" not in row


def test_what_is_not_in_the_table_is_refused_with_what_to_do():
    with pytest.raises(OrdMoEModelError, match="MixtralForCausalLM with --to sglang: not known.*Use `ordmoe merge`"):
        served("MixtralForCausalLM", "sglang")
    with pytest.raises(OrdMoEModelError, match="OlmoeForCausalLM.*Pass --to vllm-2d, or use `ordmoe merge`"):
        served("OlmoeForCausalLM", "sglang")
    with pytest.raises(OrdMoEModelError, match="GptOssForCausalLM.*Pass --to vllm-3d or sglang"):
        served("GptOssForCausalLM", "vllm-2d")
    with pytest.raises(OrdMoEModelError, match="no flag is_3d_moe_weight on Qwen3MoeForCausalLM"):
        served("Qwen3MoeForCausalLM", "vllm-3d")
