"""Tiny models of real classes, with random weights from a fixed seed."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OpenAIPrivacyFilterConfig,
    OpenAIPrivacyFilterForTokenClassification,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)


VOCAB_SIZE, HIDDEN_SIZE, EXPERT_WIDTH, NUM_EXPERTS, TOP_K, NUM_LAYERS = 96, 64, 24, 8, 2, 3
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, PAD, EOS = 90, 91, 92, 93, 0, 94

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
MOE = TEXT | {"head_dim": 16, "num_experts": NUM_EXPERTS, "moe_intermediate_size": EXPERT_WIDTH}


def qwen3_moe(**changes) -> PreTrainedModel:
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**(MOE | {"norm_topk_prob": True} | changes)))


def olmoe(**changes) -> PreTrainedModel:
    own = {"num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH}
    return _build(OlmoeForCausalLM, OlmoeConfig(**(TEXT | own | changes)))


def mixtral(**changes) -> PreTrainedModel:
    own = {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH, "sliding_window": None}
    return _build(MixtralForCausalLM, MixtralConfig(**(TEXT | own | changes)))


def gpt_oss(**changes) -> PreTrainedModel:
    own = {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH, "head_dim": 16, "sliding_window": 16}
    return _build(GptOssForCausalLM, GptOssConfig(**(TEXT | own | changes)))


def openai_privacy_filter(**changes) -> PreTrainedModel:
    """The family whose experts are transposed and biased, with gate and up side by side."""
    own = {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH, "head_dim": 16, "sliding_window": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = OpenAIPrivacyFilterConfig(**(TEXT | own | {"rope_parameters": rope} | changes))
    return _build(OpenAIPrivacyFilterForTokenClassification, config)


def nemotron_h(**changes) -> PreTrainedModel:
    """The family without gates; its layers are an attention or a MoE each."""
    own = {
        "layers_block_type": ["full_attention", "moe"] * NUM_LAYERS,
        "num_hidden_layers": 2 * NUM_LAYERS,
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_WIDTH,
        "moe_shared_expert_intermediate_size": 40,
        "head_dim": 16,
    }
    return _build(NemotronHForCausalLM, NemotronHConfig(**(TEXT | own | changes)))


def qwen2_moe(**changes) -> PreTrainedModel:
    """The family with shared experts."""
    own = {"shared_expert_intermediate_size": 40, "intermediate_size": 40}
    return _build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**(MOE | own | changes)))


def deepseek_v3(**changes) -> PreTrainedModel:
    """A family whose router chooses within half of its four groups of two experts."""
    own = {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_WIDTH,
        "intermediate_size": 40,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    return _build(DeepseekV3ForCausalLM, DeepseekV3Config(**(TEXT | {"num_key_value_heads": 4} | own | changes)))


def qwen3_dense() -> PreTrainedModel:
    """A model without MoE layers."""
    dense = {name: value for name, value in TEXT.items() if name != "num_experts_per_tok"}
    return _build(Qwen3ForCausalLM, Qwen3Config(**dense, head_dim=16, intermediate_size=40))


def qwen3_vl_moe(**changes) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN_SIZE,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLMoeConfig(
        text_config=MOE | {"rope_parameters": rope, "intermediate_size": 40} | changes,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _build(Qwen3VLMoeForConditionalGeneration, config)


FAMILIES = {"qwen3_moe": qwen3_moe, "olmoe": olmoe, "mixtral": mixtral, "qwen3_vl_moe": qwen3_vl_moe}


def _build(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Routers that all but tie would make every ranking test a test of rounding.
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "gate.weight" in name or "router.weight" in name else 0.1)
    return model


def text_batch(rows: int = 3, length: int = 7, padding: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens, the first row left-padded."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, IMAGE_TOKEN, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :padding], attention_mask[0, :padding] = PAD, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def image_batch(rows: int = 2) -> dict[str, torch.Tensor]:
    """Random 4 x 4-patch images, 4 image tokens each, with random text around; the first row is left-padded."""
    generator = torch.Generator().manual_seed(2)
    image = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END]
    input_ids = torch.tensor(
        [[*torch.randint(1, 89, (3,), generator=generator), *image, *torch.randint(1, 89, (4,), generator=generator)]]
        * rows
    )
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :2], attention_mask[0, :2] = PAD, 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def batch_for(family: str) -> dict[str, torch.Tensor]:
    return image_batch() if family == "qwen3_vl_moe" else text_batch()


def randomize_adapter(model: torch.nn.Module, seed: int = 3) -> None:
    """Give `lora_B` values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
