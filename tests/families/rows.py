"""The table: a row for each Mixture-of-Experts class of transformers.

A row says how its configuration is made small, which inputs it takes and what is refused today. A new family fails
`test_every_family_has_a_row` until it has one: add `Row("ItsForCausalLM")`, run `pytest tests/families -k its_folder`,
and say in `refused` what is refused and with which message.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families import tiny
from tests.families.tiny import AUDIO_TOKEN, EXPERTS, HIDDEN, IMAGE_TOKEN, LAYERS, TOP_K, WIDTH


@dataclass(frozen=True)
class Row:
    """A class and what is expected of it.

    Args:
        name (`str`): the model class.
        changes (`dict`): of its tiny configuration; see [`~tests.families.tiny.tiny_config`].
        media (`dict`): its inputs beside text; see [`~tests.families.tiny.tiny_batch`].
        refused (`dict`): `"tiers"`, `"lora"` (or one role of it, `"router"` or `"experts"`), `"merging"` or
            `"4 bits"` → regular expression of the message that refuses it. What is not named works.
        no_export (`dict`): role → regular expression of the message that refuses it in an export to plain PEFT.
        upstream (`dict`): name of a test → why it cannot hold, for a reason that lies in transformers or PEFT alone.
        variant (`str`): what sets it apart from the class's other rows.
        config (`str`): its configuration's class, where a family has one of its own and another family's models.
        since (`str`): the version of transformers that has it first, where not all supported ones do.
        mend (`Callable`, *optional*): given a model, what makes up for what is broken upstream.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    no_export: dict[str, str] = field(default_factory=dict)
    upstream: dict[str, str] = field(default_factory=dict)
    variant: str = ""
    config: str = ""
    since: str = ""
    mend: Callable[[PreTrainedModel], Any] | None = None

    @cached_property
    def model_class(self) -> type[PreTrainedModel] | None:
        return tiny.class_named(self.name)

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return getattr(transformers, self.config) if self.config else self.model_class.config_class

    @property
    def is_installed(self) -> bool:
        return self.model_class is not None and hasattr(transformers, self.config or "PreTrainedConfig")

    @property
    def folder(self) -> str:
        return (self.config_class if self.config else self.model_class).__module__.split(".")[-2]

    @property
    def id(self) -> str:
        """The folder and the class, so that `pytest -k` finds it by either."""
        variant = f"-{self.variant}".replace(" ", "_") if self.variant else ""
        return f"{self.folder}-{self.name}{variant}"

    @property
    def works(self) -> bool:
        return not self.refused

    @property
    def targets(self) -> list[str]:
        """The roles that LoRA goes on."""
        return [role for role in ("router", "experts") if role not in self.refused]


PRODUCT_KEYS = r"\(DogeCDMoE\) chooses experts by the product of two halves of a key"
READS_PAST = r"reads classifier.weight itself, past the module that has it, so LoRA there would do nothing"
FLAT = "holds the matrices of all experts in one, as mlp.w1, mlp.v1, mlp.w2, where LoRA would be one for all experts"
WITHOUT_EFFECT = "its choice is not what its block runs: NllbMoeExperts reads the router's mask as indices"

SHARED = "are one and the same weight, and merging into one would change the other"
NLLB = {"tiers": WITHOUT_EFFECT, "lora": WITHOUT_EFFECT}
NOTHING = dict.fromkeys(["tiers", "lora", "4 bits"], PRODUCT_KEYS)

RENAMED_BY_PEFT = {
    "attention": r"it reads .*sconv\.weight_proj\.lora_A\.weight as .*sconv\.weight_proj\.weight\.lora_A"
}
OTHER_LOGITS_WITH_A_CACHE = {
    "test_tiers_are_held_while_decoding": "the untouched model's logits with a cache are not those without"
}


def under(path: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in changes.items()}


ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = ROPE | {"mrope_section": [4, 2, 2]}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    **{"num_hidden_layers": 4, "n_group": 1, "topk_group": 1},
}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    **{"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0, "per_layer_config": ...},
}
GEMMA_MOE = GEMMA | {"enable_moe_block": True}
DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    **{"head_dim": 16, "per_layer_config": ..., "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16},
}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "hc_lowrank": 8},
    **{"indexer_compress_ratio": 4, "ple_layer_ids": []},
}
TALKER = {
    "text_config.shared_expert_intermediate_size": 40,
    "text_config.mlp_only_layers": [],
    "text_config.rope_parameters": MROPE | {"mrope_interleaved": True},
    **{"thinker_hidden_size": HIDDEN, "spatial_merge_size": 2, "num_code_groups": 4, "accept_hidden_layer": 1},
    **under("code_predictor_config", {"num_code_groups": 4, "hidden_size": HIDDEN, "num_attention_heads": 4}),
    "code_predictor_config.layer_types": ["full_attention"] * 2,
}


def image(num_tokens: int, *shape: int, **others: list) -> dict[str, Any]:
    """Inputs with an image in each row, of `num_tokens` tokens: 3 × 56 × 56 pixels, or patches of another shape."""
    return {"tokens": [IMAGE_TOKEN] * num_tokens, "pixel_values": shape or (1, 3, 56, 56)} | others


# An image of 4 × 4 patches of 14 × 14 pixels, whose tokens are 2 × 2 patches each, in shapes of various processors.
GRID = {"image_grid_thw": [[1, 4, 4]]}
PATCHES, VIDEO_PATCHES = image(4, 16, 3 * 14 * 14, **GRID), image(4, 16, 2 * 3 * 14 * 14, **GRID)
SQUARE_PATCHES, MERGED_PATCHES = image(4, 16, 3, 14, 14, **GRID), image(4, 4, 28, 28, 3, image_grid_thw=[[1, 2, 2]])
PIXTRAL = image(4, image_sizes=[[56, 56]])
# Gemma's image of 6 × 6 patches, whose tokens are 3 × 3 patches each.
GEMMA_PATCHES = image(4, 1, 36, 3 * 14 * 14, image_position_ids=[[[x, y] for y in range(6) for x in range(6)]])
GEMMA_VISION = {
    **{"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 14},
    **{"position_embedding_size": 64, "pooling_kernel_size": 3, "global_head_dim": 16},
}
# An image, or 16 frames of sound, between the tokens for its start and its end.
THINKER = {"vision_start_token_id": 88, "audio_start_token_id": 87}
THINKER_IMAGE = {"tokens": [88, *[IMAGE_TOKEN] * 4, 89], "attention_mask": [[1] * 12]}
THINKER_SOUND = {
    **{"tokens": [87, *[AUDIO_TOKEN] * 2, 86], "attention_mask": [[1] * 10]},
    **{"input_features": (1, 16, 16), "feature_attention_mask": [[1] * 16]},
}


def without_images(module, args, output) -> None:
    """Llama 4 asks its text model's output for `image_outputs`, which that lacks (5.24): every forward fails."""
    output.image_outputs = None


ROWS = [
    Row("AfmoeForCausalLM"),
    Row("AriaTextForCausalLM"),
    Row("AriaForConditionalGeneration", {"projector_patch_to_query_dict": {16: 4}}, media=image(4)),
    Row("AXK1ForCausalLM"),
    Row("AXK2ForCausalLM"),
    Row("BailingHybridForCausalLM"),
    Row("BeamForCausalLM"),
    Row("Cohere2MoeForCausalLM"),
    Row(
        "DbrxForCausalLM",
        {
            **{"rope_parameters": ROPE, "d_model": 64, "n_heads": 4},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
        },
        refused={"experts": FLAT},
    ),
    Row(
        "DeepseekOcr2ForConditionalGeneration",
        under("text_config", DENSE_FIRST) | {"vision_config.sam_config.downsample_channels": [32, 32]},
        media=image(145),
    ),
    Row("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    Row("DeepseekV2ForCausalLM", {"topk_method": "greedy"}, variant="no groups"),
    Row("DeepseekV3ForCausalLM"),
    Row("DeepseekV3ForCausalLM", {"n_group": 1, "topk_group": 1}, variant="no groups"),
    Row("DeepseekV3ForCausalLM", {"topk_group": 3}, variant="3 of 4 groups"),
    Row("DeepseekV32ForCausalLM"),
    Row(
        "DeepseekV4ForCausalLM",
        {
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            **{"num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.5},
        },
        upstream=OTHER_LOGITS_WITH_A_CACHE,
    ),
    Row(
        "DiffusionGemmaForBlockDiffusion",
        under("text_config", GEMMA) | {"canvas_length": 4},
        refused={"merging": SHARED},
        media=GEMMA_PATCHES | {"decoder_input_ids": [[5, 6, 7, 8]]},
    ),
    Row("DogeForCausalLM", {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4}, refused=NOTHING),
    Row("Dots1ForCausalLM"),
    Row("Dots3NoteForCausalLM", DOTS3),
    Row("Dots3NoteForConditionalGeneration", under("text_config", DOTS3), media=PATCHES),
    Row("Ernie4_5_MoeForCausalLM"),
    Row(
        "Ernie4_5_VLMoeForConditionalGeneration",
        under("text_config", DENSE_FIRST | {"moe_num_experts": EXPERTS, "moe_intermediate_size": [32, 24]})
        | {"text_config.rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
        media=PATCHES | {"moe_mm_token_type_ids": [[0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]},  # as its processor gives them
    ),
    Row("ExaoneMoeForCausalLM"),
    Row("FlexOlmoForCausalLM"),
    Row("FlintForCausalLM"),
    Row("Gemma4ForCausalLM", GEMMA_MOE),
    Row(
        "Gemma4ForConditionalGeneration",
        under("text_config", GEMMA_MOE) | {"vision_config": GEMMA_VISION},
        media=GEMMA_PATCHES,
    ),
    Row("Glm4MoeForCausalLM"),
    Row("Glm4MoeLiteForCausalLM"),
    Row(
        "Glm4vMoeForConditionalGeneration",
        {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
        media=VIDEO_PATCHES,
    ),
    Row(
        "Glm5NextForConditionalGeneration",
        under("text_config", DENSE_FIRST | {"qk_rope_head_dim": 0, "qk_nope_head_dim": 16})
        | {
            "text_config.layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            "text_config.indexer_types": ["full"] * LAYERS,
        },
        media=VIDEO_PATCHES,
    ),
    Row("GlmMoeDsaForCausalLM"),
    Row("GptOssForCausalLM"),
    Row("GraniteMoeForCausalLM"),
    Row("GraniteMoeSWAForCausalLM"),
    Row("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention", "mamba"]}),
    Row("GraniteMoeSharedForCausalLM"),
    Row("HunYuanMoEV1ForCausalLM"),
    Row("HunYuanMoEV1ForCausalLM", {"moe_topk": [TOP_K] * LAYERS}, variant="list of top-k"),
    Row("HYV3ForCausalLM"),
    Row("HYV4ForCausalLM"),
    Row(
        "HYV4VLForConditionalGeneration",
        {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
        since="5.24",
        media=PATCHES | {"tokens": [IMAGE_TOKEN] * 6},
    ),
    Row("InklingForCausalLM"),
    Row(
        "InklingForConditionalGeneration",
        under("vision_config", {"n_layers": 4, "patch_size": 2, "temporal_patch_size": 2, "num_channels": 1})
        | {"vision_config.text_hidden_size": HIDDEN},
        media=image(4, 4, 2, 2, 2, 1),
    ),
    Row("Inkling2ForCausalLM", no_export=RENAMED_BY_PEFT),
    Row("Inkling2ForConditionalGeneration", no_export=RENAMED_BY_PEFT, media=MERGED_PATCHES),
    Row("Inkling2LoopForCausalLM", no_export=RENAMED_BY_PEFT, since="5.24"),
    Row("Inkling2LoopForConditionalGeneration", no_export=RENAMED_BY_PEFT, since="5.24", media=MERGED_PATCHES),
    Row("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4}),
    Row("JetMoeForCausalLM"),
    Row("Kimi_K25ForConditionalGeneration", {"projection_hidden_size": 32}, media=SQUARE_PATCHES),
    Row("KimiLinearForCausalLM"),
    Row("Kolibri1ForCausalLM"),
    Row("LagunaForCausalLM"),
    Row("LaraMiniForCausalLM", since="5.24"),
    Row(
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention", "conv"]},
    ),
    Row("Llama4ForCausalLM", {"num_experts_per_tok": 1}),
    Row(
        "Llama4ForConditionalGeneration",
        {"text_config.num_experts_per_tok": 1, "vision_config.intermediate_size": 128},
        media=image(4),
        mend=lambda model: model.language_model.register_forward_hook(without_images),
    ),
    Row("LongcatFlashForCausalLM", refused={"router": READS_PAST}),
    Row("MellumForCausalLM"),
    Row("MiMoV2FlashForCausalLM"),
    Row("MiniMaxForCausalLM"),
    Row("MiniMaxM2ForCausalLM"),
    Row("MiniMaxM3VLForCausalLM"),
    Row("MiniMaxM3SparseForConditionalGeneration", media=VIDEO_PATCHES),
    Row("Mistral4ForCausalLM", {"head_dim": 16}),
    Row("MistralLarge4ForConditionalGeneration", media=PIXTRAL),
    Row("MixtralForCausalLM"),
    Row(
        "MuseSparkForConditionalGeneration",
        {"out_hidden_size": 128, "projector_hidden_size": 64, "audio_config.hidden_sizes": [16, 32]},
        media=VIDEO_PATCHES,
    ),
    Row("NemotronHForCausalLM", NEMOTRON),
    Row(
        "NemotronHForCausalLM",
        NEMOTRON | {"moe_latent_size": 32, "n_group": 4, "topk_group": 2},
        variant="latent experts in groups",
    ),
    Row(
        "NemotronH_Omni_Reasoning_V3",
        under("text_config", NEMOTRON) | {"vision_config.video_temporal_patch_size": 2, "vision_hidden_size": 32},
        media=image(4, 16, 3 * 14 * 14, image_grid_hw=[[4, 4]]),
    ),
    Row(
        "Nemotron3_5TranscribeForConditionalGeneration",
        under("text_config", NEMOTRON)
        | {"audio_config.diarization_config.head_config.audio_hidden_size": 32}
        | {"word_timestamp_config.blank_token_id": 63},
        media={"tokens": [AUDIO_TOKEN] * 2, "input_features": (1, 16, 16), "input_features_mask": [[1] * 16]},
    ),
    Row(
        "NllbMoeForConditionalGeneration",
        {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
        refused=NLLB,
    ),
    Row("OlmoeForCausalLM"),
    Row("OpenAIPrivacyFilterForTokenClassification"),
    Row("PhimoeForCausalLM", {"router_jitter_noise": 0.3}),
    Row("Qwen2MoeForCausalLM"),
    Row("Qwen3_5MoeForCausalLM"),
    Row("Qwen3_5MoeForConditionalGeneration", media=VIDEO_PATCHES),
    Row("Qwen3MoeForCausalLM"),
    Row("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "mlp_only_layers": [0]}, variant="renormalised, dense first"),
    Row("Qwen3NextForCausalLM"),
    Row("Qwen3OmniMoeThinkerForConditionalGeneration", THINKER, media=VIDEO_PATCHES | THINKER_IMAGE),
    Row("Qwen3OmniMoeThinkerForConditionalGeneration", THINKER, media=THINKER_SOUND, variant="sound"),
    Row("Qwen3OmniMoeTalkerForConditionalGeneration", TALKER, media={"inputs_embeds": (1, 6, HIDDEN)}),
    Row("Qwen3VLMoeForConditionalGeneration", media=VIDEO_PATCHES),
    Row("Qwen4ExpForCausalLM", QWEN4),
    Row(
        "Qwen4ExpForCausalLM",
        QWEN4
        | {"ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 2, "heads_per_ngram": 2}
        | {"ple_embed_dim": 32},
        variant="n-grams",
    ),
    Row("Qwen4ExpForConditionalGeneration", under("text_config", QWEN4), media=VIDEO_PATCHES),
    Row("SolarOpenForCausalLM"),
    Row(
        "Step3p7ForConditionalGeneration",
        under("text_config", DENSE_FIRST | {"n_routed_experts": EXPERTS, "sliding_window": 16, "rope_parameters": ...})
        | {"text_config.layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        media=image(1),
    ),
    Row(
        "SwitchTransformersForConditionalGeneration",
        {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2},
    ),
    Row(
        "UnlimitedOcrForConditionalGeneration",
        {"vision_config.sam_config.downsample_channels": [32, 32]},
        media=image(3),
    ),
    Row("ZayaForCausalLM", {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * LAYERS}),
    # Models that run a Mixture of Experts of another folder, and configurations for models of one.
    Row("DeepseekV3ForCausalLM", config="SarvamMLAConfig", variant="of SarvamMLAConfig", since="5.24"),
    Row("Glm4MoeForCausalLM", config="SarvamMoEConfig", variant="of SarvamMoEConfig", since="5.24"),
    Row(
        "LlavaForConditionalGeneration", {"text_config": "Qwen3MoeForCausalLM"}, variant="of Qwen3-MoE", media=image(16)
    ),
    Row("InternVLForConditionalGeneration", {"text_config": "GptOssForCausalLM"}, variant="of gpt-oss", media=image(4)),
    Row("Mistral3ForConditionalGeneration", {"text_config": "MixtralForCausalLM"}, variant="of Mixtral", media=PIXTRAL),
]

# Classes and folders that the scan finds and that are no family.
NO_FAMILY = {
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": "abstract: it has no forward",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": "dense: it has no experts",
    "Qwen3OmniMoeForConditionalGeneration": "it has no forward; thinker and talker have rows",
    "Ernie4_5_VL_MoeForConditionalGeneration": "the deprecated name of Ernie4_5_VLMoeForConditionalGeneration",
    "vitpose_backbone": "its experts are chosen by data set, not by a router",
    "vitpose": "runs vitpose_backbone",
}
HEADS = r"^class (\w+(?:ForCausalLM|ForConditionalGeneration|ForBlockDiffusion))\("
EXPERTS_OF_THEIR_OWN = r"use_experts_implementation|^class \w+(?:Experts|MoE|NaiveMoe)\("


def installed_rows() -> list[Row]:
    return [row for row in ROWS if row.is_installed]


def folders_with_experts() -> list[str]:
    """Folders of the installed transformers whose models route among experts, or that run such a model of another."""
    modeling = {path.parent.name: path.read_text() for path in sorted(tiny.MODELS.glob("*/modeling_*.py"))}
    found = {folder for folder, source in modeling.items() if re.search(EXPERTS_OF_THEIR_OWN, source, re.MULTILINE)}
    hosts = set()
    for path in tiny.MODELS.glob("*/configuration_*.py"):
        source = path.read_text()
        named = {a or b for a, b in re.findall(r'"(\w+)"|from \.\.(\w+)', source)}
        if "sub_configs" in source and path.parent.name != "auto" and named & found:
            hosts.add(path.parent.name)
    heads = {head for folder in found for head in heads_in(folder)}
    for folder, head in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if head in heads and (tiny.MODELS / folder).is_dir() and folder not in modeling:  # a configuration alone
            hosts.add(folder)
    return sorted(found | hosts)


def heads_in(folder: str) -> Iterator[str]:
    """Model classes with a head in a folder, but for classifiers, whose body is another's."""
    for path in (tiny.MODELS / folder).glob("modeling_*.py"):
        yield from re.findall(HEADS, path.read_text(), re.MULTILINE)
