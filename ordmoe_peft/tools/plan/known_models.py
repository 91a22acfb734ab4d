"""Facts about known models: what their `config.json` says, so that a plan needs no hub.

Source: each model's `config.json` and model card on the Hugging Face hub; `parameters` is the count that is published
for it, to the digits given. Fields that transformers has as defaults, and those that do not bear on memory, are left
out.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A model that ships as facts.

    Args:
        hub_ids (`tuple[str, ...]`): checkpoints of this shape; the first is the one that `config` is of.
        parameters (`str`): the published count, in billions.
        source (`str`): where that count stands.
        config (`dict`): the configuration.
    """

    hub_ids: tuple[str, ...]
    parameters: str
    source: str
    config: dict[str, Any]


QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}

KNOWN_MODELS = {
    "Qwen3-30B-A3B": KnownModel(
        hub_ids=(
            "Qwen/Qwen3-30B-A3B",
            "Qwen/Qwen3-30B-A3B-Base",
            "Qwen/Qwen3-30B-A3B-Instruct-2507",
            "Qwen/Qwen3-30B-A3B-Thinking-2507",
        ),
        parameters="30.5",
        source="https://huggingface.co/Qwen/Qwen3-30B-A3B",
        config={
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            **QWEN3_30B,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-VL-30B-A3B": KnownModel(
        hub_ids=("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Thinking"),
        parameters="31.1",
        source="https://huggingface.co/Qwen/Qwen3-VL-30B-A3B-Instruct",
        config={
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "model_type": "qwen3_vl_moe",
            "dtype": "bfloat16",
            "tie_word_embeddings": False,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "text_config": {
                **QWEN3_30B,
                "max_position_embeddings": 262144,
                "tie_word_embeddings": False,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000000,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "out_hidden_size": 2048,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    ),
    "OLMoE-1B-7B": KnownModel(
        hub_ids=(
            "allenai/OLMoE-1B-7B-0125",
            "allenai/OLMoE-1B-7B-0125-Instruct",
            "allenai/OLMoE-1B-7B-0924",
            "allenai/OLMoE-1B-7B-0924-Instruct",
        ),
        parameters="6.92",
        source="https://huggingface.co/allenai/OLMoE-1B-7B-0125",
        config={
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "dtype": "bfloat16",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
    # OpenAI's own checkpoint holds its experts in MXFP4; what is planned is a copy of it in bf16, as the second is.
    "gpt-oss-20b": KnownModel(
        hub_ids=("openai/gpt-oss-20b", "lmsys/gpt-oss-20b-bf16"),
        parameters="20.9",
        source="https://openai.com/index/gpt-oss-model-card/",
        config={
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "dtype": "bfloat16",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "attention_bias": True,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
    "Mixtral-8x7B": KnownModel(
        hub_ids=("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        parameters="46.7",
        source="https://mistral.ai/news/mixtral-of-experts",
        config={
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": "bfloat16",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
    ),
    "DeepSeek-V2-Lite": KnownModel(
        hub_ids=("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite-Chat"),
        parameters="15.7",
        source="https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite",
        config={
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "dtype": "bfloat16",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "max_position_embeddings": 163840,
            "tie_word_embeddings": False,
        },
    ),
}


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration that ships for `name`, a key of [`KNOWN_MODELS`] or one of their hub ids, if there is one."""
    for short_name, model in KNOWN_MODELS.items():
        if name == short_name or name in model.hub_ids:
            return model.config
    return None
