"""Probes: a few sequences and what an adapter makes of them under each tier, by which one sees that it still does."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..errors import OrdMoEError
from ..tiers.routing import tier_routing
from .record import RECORD_NAME


logger = logging.get_logger(__name__)

# What a forward on tokens alone may end with, in a model that wants more, or on a device that is full.
COULD_NOT_RUN = (OrdMoEError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError)
SEQUENCES, TOKENS = 4, 12
MOST_TIERS_PROBED = 8


def make_probes(model: PeftModel, adapter_name: str) -> dict | None:
    """Sequences of tokens and their log-probabilities under tiers 1 to C (8 at most).

    Returns:
        `dict`: `token_ids`, 4 lists of 12, and `log_probs`, tier → 4 lists of 11, in nats. `None` where the model is
        not a whole causal one that takes tokens alone, or `adapter_name` is not what alone is active.
    """
    is_active = model.has_active_enabled_adapter and model.active_adapters == [adapter_name]
    if not is_active or not _is_whole_and_causal(model):
        return None
    token_ids = _sequences(model.config)
    num_tiers = min(model.peft_config[adapter_name].num_tiers, MOST_TIERS_PROBED)
    try:
        log_probs = replay(model, token_ids, num_tiers)
    except COULD_NOT_RUN as error:  # an adapter is saved in any case
        logger.warning(f"{RECORD_NAME} has no probes: the model did not run on tokens alone ({error}).")
        return None
    values = [value for rows in log_probs.values() for row in rows for value in row]
    if not all(map(math.isfinite, values)):
        logger.warning(f"{RECORD_NAME} has no probes: what the model gives is NaN or infinite. Look at its weights.")
        return None
    return {"token_ids": token_ids, "log_probs": log_probs}


def _is_whole_and_causal(model: PeftModel) -> bool:
    """Whether all weights are at hand, not sharded, and predict each token from those before it."""
    config, base = model.config, model.get_base_model()
    has_head = getattr(base, "get_output_embeddings", lambda: None)() is not None
    if not has_head or getattr(config, "is_encoder_decoder", False) or getattr(config, "canvas_length", None):
        return False
    is_offloaded = getattr(base, "hf_device_map", None) is not None
    return all(
        not isinstance(weight, DTensor) and weight.numel() and (is_offloaded or not weight.is_meta)
        for weight in model.parameters()
    )


def _sequences(config: Any) -> list[list[int]]:
    """The same random tokens for each model of a vocabulary; none that stands for an image or the like."""
    special = set(_special_tokens(config.to_dict()))
    usual = [token for token in range(config.get_text_config().vocab_size) if token not in special]
    draw = random.Random(0)
    return [[draw.choice(usual) for _ in range(TOKENS)] for _ in range(SEQUENCES)]


def _special_tokens(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def replay(model: PeftModel, token_ids: list[list[int]], num_tiers: int) -> dict[str, list[list[float]]]:
    """Log-probabilities of sequences under tiers 1 to `num_tiers`: tier → a list for each sequence, in nats."""
    embeddings = model.get_input_embeddings().weight  # offloaded ones are computed where accelerate moves their tokens
    ids_BS, of_tiers = torch.tensor(token_ids, device="cpu" if embeddings.is_meta else embeddings.device), {}
    with _as_loaded(model), torch.no_grad():
        for tier in range(1, num_tiers + 1):
            with tier_routing(model, tier):
                logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
            log_probs_BSV = logits_BSV[:, :-1].float().log_softmax(-1)
            chosen_BS = log_probs_BSV.gather(2, ids_BS[:, 1:, None])[..., 0]
            of_tiers[str(tier)] = [[round(value, 4) for value in row] for row in chosen_BS.tolist()]
    return of_tiers


@contextmanager
def _as_loaded(model: PeftModel) -> Iterator[None]:
    """Within the block the model is as it would be after loading: in evaluation mode, adapters of 16 bits in float32,
    to which PEFT casts them. Rounding their products otherwise may send a token to another expert."""
    was_training = [module for module in model.modules() if module.training]
    halves = (torch.bfloat16, torch.float16)
    cast = [(weight, weight.data) for name, weight in model.named_parameters() if ".lora_" in name]
    model.eval()
    try:
        for weight, data in cast:
            weight.data = data.float() if data.dtype in halves else data
        yield
    finally:
        for weight, data in cast:
            weight.data = data
        for module in was_training:
            module.training = True
