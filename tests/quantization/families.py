"""Tiny models of families whose experts or routers are unlike those in `tests/models.py`."""

from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
)

from tests.models import EXPERT_WIDTH, NUM_EXPERTS, TEXT, TOP_K, _build


def afmoe() -> PreTrainedModel:
    """A linear layer `router.gate`, and a dense first layer."""
    own = {
        "num_experts": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_WIDTH,
        "intermediate_size": 40,
        "head_dim": 16,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "sliding_window": 16,
    }
    return _build(AfmoeForCausalLM, AfmoeConfig(**(TEXT | own)))


def gemma4() -> PreTrainedModel:
    """A linear layer `router.proj`; router and experts are children of the decoder layer."""
    own = {
        "num_experts": NUM_EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": EXPERT_WIDTH,
        "intermediate_size": 40,
        "head_dim": 16,
        "global_head_dim": 16,
        "enable_moe_block": True,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * TEXT["num_hidden_layers"],
    }
    return _build(Gemma4ForCausalLM, Gemma4TextConfig(**(TEXT | own)))


def hunyuan_v1_moe() -> PreTrainedModel:
    """A linear layer `gate.wg`."""
    own = {"num_experts": NUM_EXPERTS, "moe_topk": TOP_K, "intermediate_size": 40, "head_dim": 16}
    return _build(HunYuanMoEV1ForCausalLM, HunYuanMoEV1Config(**(TEXT | own)))


def llama4() -> PreTrainedModel:
    """Fused experts that do not use transformers' experts interface."""
    own = {
        "num_experts_per_tok": 1,
        "num_local_experts": NUM_EXPERTS,
        "intermediate_size": EXPERT_WIDTH,
        "intermediate_size_mlp": 40,
        "head_dim": 16,
    }
    return _build(Llama4ForCausalLM, Llama4TextConfig(**(TEXT | own)))


LINEAR_ROUTERS = {"afmoe": afmoe, "gemma4": gemma4, "hunyuan_v1_moe": hunyuan_v1_moe}
