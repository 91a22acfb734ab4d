"""Tiny random models from the config classes of transformers: the usual fields made small, then a row's changes."""

import glob
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel


LAYERS, VOCAB, HIDDEN, EXPERTS, TOP_K, WIDTH = 3, 96, 64, 8, 2, 32
IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN, EOS = 90, 91, 92, 94
# Text is drawn from the tokens before this one.
FIRST_SPECIAL_TOKEN = 84
MODELS = Path(transformers.__path__[0]) / "models"

# Fields of text configs. A field whose default is None is left alone, but for those in FORCED.
TEXT: dict[str, Any] = {
    # sizes
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model"], HIDDEN),
    **dict.fromkeys(["num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_heads", "num_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "index_n_heads"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_sliding_attention_heads"], 4),
    **dict.fromkeys(["head_dim", "swa_head_dim", "qk_head_dim", "v_head_dim", "index_head_dim", "d_kv"], 16),
    **dict.fromkeys(["intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "d_ff"], 64),
    **dict.fromkeys(["ffn_hidden_size", "prefix_dense_intermediate_size"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 64),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["max_position_embeddings", "max_seq_len", "model_max_length"], 256),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "gated_norm_rank", "d_rel"], 8),
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk"], TOP_K),
    **dict.fromkeys(["moe_top_k", "topk_group", "zero_expert_num"], 2),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "moe_latent_size"], WIDTH),
    **dict.fromkeys(["shared_expert_intermediate_size", "shared_experts_intermediate_size"], 40),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"], 40),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "num_expert_group"], 4),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    **{"moe_hidden_size": 48, "router_hidden_size": 16, "moe_layer_end_index": LAYERS - 1},
    # windows and indexers: of more tokens than there are, so of all
    **dict.fromkeys(["index_topk", "attention_chunk_size", "keep_window_size"], 64),
    **{"index_topk_blocks": 16, "index_block_size": 4, "index_kpool": 4, "o_groups": 2, "rel_extent": 32},
    **dict.fromkeys(["sliding_window", "sliding_window_size"], 16),
    # linear attention and state spaces
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_dt_rank", "block_size"], 8),
    **dict.fromkeys(["linear_head_dim", "mamba_d_state", "mamba_head_dim", "ssm_state_size"], 16),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    **{"linear_num_key_heads": 2, "mamba_d_head": 32, "n_groups": 2, "use_mamba_kernels": False},
    # no noise, no layers for further tokens
    **dict.fromkeys(["dropout", "dropout_rate", "attention_dropout", "activation_dropout", "moe_token_dropout"], 0.0),
    **dict.fromkeys(["encoder_layerdrop", "decoder_layerdrop", "router_jitter_noise", "input_jitter_noise"], 0.0),
    **{"num_nextn_predict_layers": 0, "num_mtp_layers": 0, "moe_jitter_eps": None},
}
FORCED = {
    *("num_experts", "num_experts_per_tok", "top_k_experts", "moe_intermediate_size", "head_dim", "n_routed_experts"),
    *("n_shared_experts", "n_group", "topk_group", "num_key_value_heads", "sliding_window"),
}
TOKENS = {
    **dict.fromkeys(["image_token_id", "image_token_index"], IMAGE_TOKEN),
    **dict.fromkeys(["video_token_id", "video_token_index"], VIDEO_TOKEN),
    **dict.fromkeys(["audio_token_id", "audio_token_index", "sound_token_id"], AUDIO_TOKEN),
    **{"pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 93},
}
# Fields of vision, audio and speech configs.
OTHER: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "decoder_dim", "adapter_in_dim", "adapter_input_size"], 32),
    **dict.fromkeys(["projector_input_dim", "projector_output_dim", "projection_hidden_dim", "output_proj_dims"], 32),
    **dict.fromkeys(["vision_output_dim", "moe_hidden_size"], 32),
    **dict.fromkeys(["out_hidden_size", "output_dim", "text_hidden_size", "adapter_out_dim"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "mlp_dim", "encoder_ffn_dim", "projection_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "depth", "n_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "num_position_embeddings", "downsample_hidden_size"], 16),
    **dict.fromkeys(["num_mel_bins", "n_mel_bins", "mel_vocab_size", "output_channels"], 16),
    **dict.fromkeys(["vocab_size", "codebook_size", "conv_output_size", "position_embedding_size"], 64),
    **{
        "image_size": 56,
        "patch_size": 14,
        "max_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "num_quantizers": 2,
    },
    **{"moe_intermediate_size": 24, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
}


def class_named(name: str) -> type[PreTrainedModel] | None:
    """The model class `name` of the installed transformers, exported or not; `None` if there is none."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    for path in map(Path, sorted(glob.glob(str(MODELS / "*" / "modeling_*.py")))):
        if re.search(rf"^class {name}\(", path.read_text(), re.MULTILINE):
            return getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
    return None


def tiny_config(config_class: type[PreTrainedConfig], changes: dict[str, Any], path: str = "") -> PreTrainedConfig:
    """A small configuration.

    Args:
        config_class (`type`): its class.
        changes (`dict`): values by field, with a dotted path for fields of sub-configurations; `...` leaves a field to
            the class, and a model class's name in place of a sub-configuration means that of that model.
        path (`str`): where in `changes` the fields of this class are.
    """
    default = config_class()
    known, prefix, sub_configs = default.to_dict(), f"{path}." if path else "", default.sub_configs or {}
    is_text = path.rpartition(".")[2] in ("", "text_config", "thinker_config", "talker_config")
    values: dict[str, Any] = {"per_layer_config": None} if "per_layer_config" in known else {}
    if not (path == "" and {"text_config", "thinker_config"} & set(sub_configs)):
        values |= _usual_values(known, is_text, changes.get(f"{prefix}num_hidden_layers", LAYERS if is_text else 2))
    values |= {name: token for name, token in TOKENS.items() if is_text and name in known}
    for name in sub_configs:
        sub, own = getattr(default, name, None), changes.get(f"{prefix}{name}")
        if isinstance(own, str):
            own = tiny_config(class_named(own).config_class, {})
        if own is not None or isinstance(sub, PreTrainedConfig):
            values[name] = own if own is not None else tiny_config(type(sub), changes, prefix + name)
    for field, value in changes.items():
        name = field.removeprefix(prefix)
        if field.startswith(prefix) and "." not in name and not (name in sub_configs and isinstance(value, str)):
            values[name] = value
    return config_class(**{name: value for name, value in values.items() if value is not ...})


def _usual_values(known: dict[str, Any], is_text: bool, layers: int) -> dict[str, Any]:
    """The usual small values of the fields in `known`; lists with an entry for each layer are cut to `layers`."""
    usual, values = TEXT if is_text else OTHER, {}
    for field, value in known.items():
        is_set = value is not None or field in FORCED
        if field in usual and not isinstance(value, list | tuple) and (is_set or not is_text):
            values[field] = usual[field]
        elif field == "mlp_layer_types" and value:
            values[field] = (["dense"] * ("dense" in value) + ["sparse"] * layers)[:layers]
        elif isinstance(value, list) and value and len(value) == known.get("num_hidden_layers"):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            values[field] = [kinds[min(i, len(kinds) - 1)] for i in range(layers)]
    if is_text and "kv_lora_rank" in known:
        values |= {"num_key_value_heads": 4, "head_dim": 8} if "head_dim" in known else {"num_key_value_heads": 4}
    return values


def tiny_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model in evaluation mode, with random weights from a fixed seed."""
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            is_bias = re.search(r"correction_bias|expert_bias|e_score", name) and tensor.is_floating_point()
            if isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1:
                # Routers that all but tie would make every check of ranks a check of rounding.
                is_router = re.search(r"router|(^|\.)gate\.(weight|wg\.|gate\.|proj\.)|classifier", name)
                tensor.normal_(std=0.5 if is_router else 0.1, generator=generator)
            elif is_bias:
                tensor.normal_(std=0.1, generator=generator)
            elif name.endswith("tid2eid"):  # the experts of each token
                tensor.copy_(torch.rand(len(tensor), EXPERTS, generator=generator).argsort(1)[:, : tensor.shape[1]])
    return model


def tiny_batch(
    model: PreTrainedModel, media: dict[str, Any], rows: int = 3, length: int = 6
) -> dict[str, torch.Tensor]:
    """Random inputs of `model`.

    Args:
        media (`dict`): for images, sounds and other inputs. `"tokens"` are put after the first token of each row; other
            entries are inputs by name: the shape of a row's part, random and put together along the first dimension, as
            a tuple, or its values, as a list.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, FIRST_SPECIAL_TOKEN, (rows, length), generator=generator)
    tokens = torch.tensor([media.get("tokens", [])] * rows, dtype=torch.long)
    batch = {"input_ids": torch.cat([input_ids[:, :1], tokens, input_ids[:, 1:]], dim=1)}
    for name, part in media.items():
        if isinstance(part, tuple):
            batch[name] = torch.randn(part[0] * rows, *part[1:], generator=generator)
        elif name != "tokens":
            batch[name] = torch.tensor(part * rows)
    if "inputs_embeds" in batch:
        del batch["input_ids"]
    elif "tokens" in media and "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    if not media:  # the first row is padded on the left
        batch["attention_mask"] = torch.ones_like(input_ids)
        batch["input_ids"][0, :2], batch["attention_mask"][0, :2] = 0, 0
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = input_ids
    return batch
