"""A pass over data under one tier that watches routers and experts.

Shape suffixes as in `experts/__init__.py`; n counts samples, L MoE layers.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...data.generation import evaluation_mode
from ...data.samples import ProcessingClass, sample_batches, scoring_inputs
from ...errors import OrdMoEModelError
from ...moe_model import MoELayer, MoEModel
from ...monitoring.recording import Call, record, recorded_router_outputs
from ...tiers.router_check import check_router
from ...tiers.routing import adapter_config, tier_routing
from ...tiers.scope import IGNORED_LABEL, tiers_of_labels
from .correlation import routing_score
from .evaluation import model_inputs


@dataclass
class ExpertTokens:
    """Some tokens at one layer's experts.

    Args:
        hidden_states_NH (`torch.Tensor` of shape `(N, H)`): what goes into the experts.
        top_k_index_NK (`torch.Tensor` of shape `(N, K)`): each token's experts.
    """

    hidden_states_NH: torch.Tensor
    top_k_index_NK: torch.Tensor


# The experts of all tokens of a forward (`(T, K)`), and some of the tokens in full.
ExpertCall = tuple[torch.Tensor, ExpertTokens]


@dataclass
class TierObservation:
    """What routers and experts did with a data set under one tier.

    Args:
        routing_scores_nL (`torch.Tensor` of shape `(n, L)`): see
            [`~ordmoe_peft.tools.measure.correlation.routing_score`].
        expert_tokens (`list[ExpertTokens]`): one per MoE layer, of tokens spread evenly over the data.
    """

    routing_scores_nL: torch.Tensor
    expert_tokens: list[ExpertTokens]


def outer_experts(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The experts of `layer` as their block calls them, with whatever LoRA wraps them."""
    return getattr(model.get_submodule(layer.block_name), layer.experts_name.rpartition(".")[2])


def reason_not_to_watch(model: nn.Module) -> str | None:
    """Why [`observe_tier`] cannot read what a layer's router or experts do; `None` where it can read all of them."""
    for layer in MoEModel.of(model).layers:
        if not check_router(layer).is_readable:
            return f"{layer.router_name} ({type(layer.router).__name__}) does not return (logits, weights, experts)"
        if not {"hidden_states", "top_k_index"} <= inspect.signature(layer.experts.forward).parameters.keys():
            return f"{layer.experts_name} ({type(layer.experts).__name__}) is not called with all tokens and experts"
    return None


@contextmanager
def recorded_expert_calls(model: nn.Module, token_N: torch.Tensor) -> Iterator[list[ExpertCall]]:
    """Within the block, append the inputs of each MoE layer's experts to the list given, layer by layer.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        token_N (`torch.Tensor` of shape `(N,)`): positions of the tokens whose hidden states are kept: those of all
            tokens in all layers would be most of a forward's memory.
    """
    calls: list[ExpertCall] = []

    def append(call: Call) -> None:
        # The experts interface fixes both the order and the names of these arguments.
        hidden_states, index = call.argument(0, "hidden_states"), call.argument(1, "top_k_index")
        kept_N = token_N.to(index.device)
        calls.append((index, ExpertTokens(hidden_states[kept_N], index[kept_N])))

    with record(model, experts=append):
        yield calls


def observe_tier(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    tier: int,
    *,
    batch_size: int = 32,
    num_tokens: int = 256,
    **routing: Any,
) -> TierObservation:
    """Read every sample's prompt and reference answer under `tier` and note what routers and experts do.

    Args:
        model, processing_class, dataset, batch_size, routing: as
            [`~ordmoe_peft.tools.measure.evaluation.evaluate_tiers`] takes them.
        tier (`int`): the tier, from 1.
        num_tokens (`int`, defaults to 256): tokens whose inputs to the experts are kept, out of those on the tier:
            all but padding, or with the adapter's `token_scope="response"` those that predict a response token.

    Raises:
        [`OrdMoEModelError`]: experts or routers were not called once per layer with a row per token.
    """
    per_batch = math.ceil(num_tokens / math.ceil(len(dataset) / batch_size))
    token_scope = adapter_config(model).token_scope
    scores, kept = [], []
    with evaluation_mode(model), tqdm(total=len(dataset), desc=f"Watching tier {tier}", unit="sample") as bar:
        for samples in sample_batches(dataset, batch_size):
            inputs = model_inputs(scoring_inputs, samples, processing_class, model)
            labels_BS = inputs.pop("labels")
            # A position's routing makes the token after it.
            predicts_BS = nn.functional.pad(labels_BS[:, 1:] != IGNORED_LABEL, (0, 1))
            watched_BS = predicts_BS if token_scope == "response" else inputs["attention_mask"]
            token_N = spread(watched_BS.reshape(-1).nonzero()[:, 0], per_batch)
            tiers = tiers_of_labels(torch.full((len(samples),), tier), labels_BS, token_scope)
            with (
                tier_routing(model, tiers, **routing),
                recorded_router_outputs(model) as outputs,
                recorded_expert_calls(model, token_N) as calls,
            ):
                model(**inputs)
            logits = [output.logits_TE for output in outputs if output.logits_TE is not None]
            _check_calls(model, logits, calls, labels_BS.numel())
            of_layers = [
                routing_score(logits_TE, index_TK, predicts_BS).cpu()
                for logits_TE, (index_TK, _) in zip(logits, calls, strict=True)
            ]
            scores.append(torch.stack(of_layers, dim=1))
            kept.append([tokens for _, tokens in calls])
            bar.update(len(samples))
    expert_tokens = [_joined(of_layer, num_tokens) for of_layer in zip(*kept, strict=True)]
    return TierObservation(torch.cat(scores), expert_tokens)


def spread(values_N: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the values, evenly spaced."""
    if count >= len(values_N):
        return values_N
    return values_N[torch.arange(count, device=values_N.device) * len(values_N) // count]


def _joined(parts: tuple[ExpertTokens, ...], num_tokens: int) -> ExpertTokens:
    return ExpertTokens(
        torch.cat([part.hidden_states_NH for part in parts])[:num_tokens],
        torch.cat([part.top_k_index_NK for part in parts])[:num_tokens],
    )


def _check_calls(model: nn.Module, logits: list[torch.Tensor], calls: list[ExpertCall], num_tokens: int) -> None:
    num_layers = len(MoEModel.of(model).layers)
    rows = {len(tensor) for tensor in (*logits, *(index_TK for index_TK, _ in calls))}
    if len(logits) != num_layers or len(calls) != num_layers or rows != {num_tokens}:
        raise OrdMoEModelError(
            f"{type(model).__name__} called its {num_layers} routers {len(logits)} times and their experts "
            f"{len(calls)} times in one forward of {num_tokens} tokens, with {sorted(rows)} rows each: its routing "
            "cannot be told apart by sample."
        )
