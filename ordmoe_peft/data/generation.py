"""Responses written under tiers: one `generate` call for all of them, one row per tier and prompt."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import OrdMoEConfigError
from ..tiers.plan import RandomDraw
from ..tiers.routing import adapter_config, tier_routing
from ..tiers.scope import IGNORED_LABEL, tiers_of_prompts
from .images import ENCODED, concatenated_images, encode_images


@dataclass
class TierResponses:
    """What each tier wrote for each prompt of a batch.

    Args:
        ids_CBS (`torch.Tensor` of shape `(C, B, S)`): new tokens, right-padded; tiers in the order asked for.
        mask_CBS (`torch.Tensor` of shape `(C, B, S)`): where there is a token, the end-of-sequence token included.
    """

    ids_CBS: torch.Tensor
    mask_CBS: torch.Tensor


def repeat_rows(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """Model inputs with their rows repeated as a whole `times` times.

    Images are flattened over the batch, in its order, so they repeat like rows.
    """
    # Repeated even once: `generate` changes what it is given in place, for beams.
    repeated = {
        name: torch.cat([value] * times) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    if ENCODED in inputs:
        repeated[ENCODED] = concatenated_images([inputs[ENCODED]] * times)
    return repeated


def with_responses(prompts: dict[str, Any], ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> dict[str, Any]:
    """Left-padded prompts' inputs with responses appended, and labels: the responses' tokens.

    Every token stays at the position where `generate` read or wrote it, which `random` grouping draws from::

        input_ids        pad   p1   p2 |  r1  end  pad
        attention_mask     0    1    1 |   1    1    0
        labels          -100 -100 -100 |  r1  end -100
        token_type_ids     0    9    8 |   0    0    0      and whatever else has a value per token: 0 is text

    `ids_BS` are the responses (`torch.Tensor` of shape `(B, S)`), `mask_BS` says where they have a token.
    """
    tails = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.where(mask_BS, IGNORED_LABEL)}
    shape = prompts["input_ids"].shape
    prompts = {**prompts, "labels": torch.full_like(prompts["input_ids"], IGNORED_LABEL)}
    return {
        name: torch.cat([value, tails.get(name, torch.zeros_like(ids_BS)).to(value.dtype)], 1)
        if isinstance(value, torch.Tensor) and value.shape == shape
        else value
        for name, value in prompts.items()
    }


@contextmanager
def evaluation_mode(model: nn.Module, grad_mode: Callable[[], Any] = torch.inference_mode) -> Iterator[None]:
    """Within the block, `model` is in evaluation mode and nothing is recorded for gradients.

    Give `torch.no_grad` as `grad_mode` where a later backward needs the block's tensors.
    """
    was_training = model.training
    model.eval()
    try:
        with grad_mode():
            yield
    finally:
        model.train(was_training)


def sampling_arguments(
    max_completion_length: int, temperature: float, top_p: float, top_k: int, repetition_penalty: float
) -> dict[str, Any]:
    """The arguments of `generate` for options named as in TRL; temperature 0 is greedy."""
    shared = {"max_new_tokens": max_completion_length, "repetition_penalty": repetition_penalty}
    if temperature == 0:
        return shared | {"do_sample": False}
    return shared | {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def check_one_response(generation: dict[str, Any]) -> None:
    """Raise [`OrdMoEConfigError`] if these arguments of `generate` ask for several responses to a prompt."""
    if generation.get("num_return_sequences", 1) != 1:
        raise OrdMoEConfigError(
            f"num_return_sequences={generation['num_return_sequences']}: each tier writes one response to a prompt. "
            "Leave it at 1; another seed gives another response."
        )


def placeholder_ids(model: nn.Module) -> list[int]:
    """Ids of the tokens that stand for images, video or sound in `model`'s inputs, as its configuration names them.

    A response must not hold any: as an input it would ask for an image that is not there.
    """
    named = model.config.to_dict().items()
    pattern = r"(image|video|audio|vision)\w*_token_(id|index)"
    return sorted({value for name, value in named if re.fullmatch(pattern, name) and isinstance(value, int)})


def generate_by_tier(
    model: nn.Module,
    inputs: dict[str, Any],
    tiers: Sequence[int],
    *,
    seed: int,
    end_ids: torch.Tensor,
    pad_token_id: int,
    rows_per_call: int | None = None,
    routing: dict[str, Any] | None = None,
    **generation: Any,
) -> TierResponses:
    """Let each of `tiers` write a response to each prompt, prefill and every decoding step held to it.

    Tokens that stand for images, video or sound are not written. Images are encoded once for all tiers.

    Sampling draws from a generator state of its own, set from `seed`: the same call gives the same responses, whatever
    ran before it, and the global state is left as it was. With `rows_per_call` it also depends on how tiers are shared
    out over calls.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        inputs (`dict`): left-padded prompts, B rows, as `generate` takes them.
        tiers (sequence of `int`): the tiers that write, from 1.
        seed (`int`): seed of the sampling.
        end_ids (`torch.Tensor`): token ids that end a response; see
            [`~ordmoe_peft.data.responses.end_of_sequence_ids`].
        pad_token_id (`int`): fills rows that ended.
        rows_per_call (`int`, *optional*): most rows in one `generate` call, at least one tier's; all by default.
        routing (`dict`, *optional*): settings for [`~ordmoe_peft.tier_routing`], e.g. `num_tiers`.
        generation: arguments of `generate`, e.g. `max_new_tokens`, `do_sample`, `temperature`.

    Raises:
        [`OrdMoEConfigError`]: several responses to a prompt were asked for.
    """
    check_one_response(generation)
    batch_size, prompt_length = inputs["input_ids"].shape
    routing = with_samples(routing or {}, batch_size)
    tiers_per_call = max(1, rows_per_call // batch_size) if rows_per_call else len(tiers)
    token_scope = adapter_config(model).token_scope
    own = generation.pop("suppress_tokens", None) or model.generation_config.suppress_tokens or []
    suppressed = sorted({*own, *placeholder_ids(model)})
    devices = [model.device] if model.device.type == "cuda" else []
    parts = []
    with evaluation_mode(model, torch.no_grad), torch.random.fork_rng(devices=devices):
        inputs = encode_images(model, inputs)
        torch.manual_seed(seed)
        for start in range(0, len(tiers), tiers_per_call):
            part = torch.tensor(tiers[start : start + tiers_per_call])
            rows = tiers_of_prompts(part.repeat_interleave(batch_size), prompt_length, token_scope)
            with tier_routing(model, rows, **routing):
                output = model.generate(
                    **repeat_rows(inputs, len(part)),
                    eos_token_id=end_ids.tolist() or None,
                    pad_token_id=pad_token_id,
                    suppress_tokens=suppressed or None,
                    **generation,
                )
            parts.append(output[:, prompt_length:])
    return _padded(parts, len(tiers), end_ids, pad_token_id)


def with_samples(routing: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Arguments of [`~ordmoe_peft.tier_routing`] for rows that repeat so many samples."""
    return routing | {"draw": replace(routing.get("draw", RandomDraw()), num_samples=num_samples)}


def _padded(parts: list[torch.Tensor], num_tiers: int, end_ids: torch.Tensor, pad_token_id: int) -> TierResponses:
    """The rows of several calls, as long as the longest; nothing after a row's first end token counts."""
    rows = [row for part in parts for row in part]
    ids_NS = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths_N1 = torch.tensor([[len(row)] for row in rows], device=ids_NS.device)
    is_end_NS = torch.isin(ids_NS, end_ids.to(ids_NS.device))
    ended_before_NS = (is_end_NS.cumsum(1) - is_end_NS.long()) > 0
    mask_NS = ~ended_before_NS & (torch.arange(ids_NS.shape[1], device=ids_NS.device) < lengths_N1)
    ids_NS = ids_NS.masked_fill(~mask_NS, pad_token_id)
    return TierResponses(*(rows_NS.unflatten(0, (num_tiers, -1)) for rows_NS in (ids_NS, mask_NS)))
