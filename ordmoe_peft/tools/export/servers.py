"""What inference servers take of LoRA on MoE models, as read in their sources. No server has run with what is written.

vLLM has one class of LoRA layer for experts whose factors come in PEFT's two matrices (`vllm-3d`), for models with the
flag `is_3d_moe_weight`, and one for keys of each expert (`vllm-2d`), for all others. SGLang reads keys of each expert.
`docs/SERVING.md` says where this stands in their sources.
"""

from dataclasses import dataclass

from ...errors import OrdMoEModelError


FORMATS = ("vllm-3d", "vllm-2d", "sglang")
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
SHARED = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Served:
    """What a server takes on one class of models.

    Args:
        source (`str`): where in its sources, and in which copy.
        linears (`frozenset[str]`): the linear layers beside the experts, by the last part of their names.
        router (`bool`): whether LoRA on the router has an effect.
    """

    source: str
    linears: frozenset[str] = ATTENTION
    router: bool = True


# Class of the base → format → what is taken.
SERVED: dict[str, dict[str, Served]] = {
    "Qwen3MoeForCausalLM": {
        "vllm-2d": Served("vllm models/qwen3_moe.py, get_expert_mapping (002456df)"),
        "sglang": Served("sglang srt/lora/mem_pool.py and utils.py (01235a16)", router=False),
    },
    "Qwen3VLMoeForConditionalGeneration": {
        "vllm-3d": Served("vllm models/qwen3_vl_moe.py, is_3d_moe_weight (#47088)"),
        "sglang": Served("sglang models/qwen3_vl_moe.py, _lora_pattern_moe", router=False),
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "vllm-3d": Served("vllm models/qwen3_5.py, is_3d_moe_weight (#47088)", ATTENTION | SHARED),
    },
    "GptOssForCausalLM": {
        # On some platforms vLLM multiplies with the router's weight itself, past its LoRA.
        "vllm-3d": Served("vllm models/gpt_oss.py, is_3d_moe_weight (#47088)", router=False),
        "sglang": Served("sglang models/gpt_oss.py, _lora_pattern_moe; lora/layers.py interleaves", router=False),
    },
    "OlmoeForCausalLM": {"vllm-2d": Served("vllm models/olmoe.py, get_expert_mapping (048a32c7)")},
    "DeepseekV2ForCausalLM": {"vllm-2d": Served("vllm models/deepseek_v2.py, SupportsLoRA", SHARED)},
    "DeepseekV3ForCausalLM": {"vllm-2d": Served("vllm models/deepseek_v2.py, SupportsLoRA", SHARED)},
}


def served(base_class: str, to: str) -> Served:
    """What the server of the format `to` takes on models of class `base_class`.

    Raises:
        [`OrdMoEModelError`]: it does not take the format on that class, or nobody has looked.
    """
    formats = SERVED.get(base_class, {})
    if to in formats:
        return formats[to]
    if to == "vllm-3d" and "vllm-2d" in formats:
        raise OrdMoEModelError(
            f"vLLM has no flag is_3d_moe_weight on {base_class}. With a file of 'vllm-3d' it would stop, pass over "
            "the experts, or mix them without a word, by its version. Pass --to vllm-2d."
        )
    known = sorted(name for name, row in SERVED.items() if to in row)
    instead = f"Pass --to {' or '.join(formats)}, or use" if formats else "Use"
    raise OrdMoEModelError(
        f"{base_class} with --to {to}: not known to be served. Known from the server's sources are {', '.join(known)}. "
        f"{instead} `ordmoe merge`, whose output every server of the base takes."
    )
