"""What a forward pass is told about tiers: which tier each row is on, and how tiers are cut."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch

from ..errors import OrdMoEConfigError, OrdMoERuntimeError
from ..moe_model import MoELayer
from .ranking import GROUPINGS, check_tiers_fit


LAYER_SCOPES = ("all", "shallow", "deep")
TIER_WEIGHTS = ("router", "match")


@dataclass(frozen=True)
class TierSettings:
    """How tiers are cut, in which layers, and how their experts are weighted: see [`OrdMoEConfig`].

    Args:
        num_tiers (`int`), grouping (`str`), layer_scope (`str` or sequence of `int`), tier_weights (`str`): as there.
        seed (`int`): what `random` grouping draws from.
    """

    num_tiers: int
    grouping: str = "uniform"
    layer_scope: str | Sequence[int] = "all"
    tier_weights: str = "router"
    seed: int = 0

    def check(self) -> None:
        """Raise [`OrdMoEConfigError`] for a value that no model can have."""
        check_whole_numbers(num_tiers=self.num_tiers, seed=self.seed)
        for name, choices in (("grouping", GROUPINGS), ("tier_weights", TIER_WEIGHTS)):
            if getattr(self, name) not in choices:
                raise OrdMoEConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class RandomDraw:
    """Which draw of `random` grouping a forward's tokens get, beside their layer and the seed. Others do not read it.

    Args:
        step (`int`, defaults to 0): the same draw is made again at the same step.
        num_samples (`int`, *optional*): distinct samples where rows repeat them once per tier, so that all tiers of a
            sample share one order; by default each row is a sample.
        first_sample (`int`, defaults to 0): samples of the same step before this forward's, those of other
            micro-batches and processes, so that what a sample draws does not depend on how a batch is shared out.
        positions (`torch.Tensor` of shape `(n, S)`, *optional*): the position in its sample that each column is drawn
            for, −1 for padding, where rows hold several tiers on one prompt; by default its column.
    """

    step: int = 0
    num_samples: int | None = None
    first_sample: int = 0
    positions: torch.Tensor | None = None

    def check(self) -> None:
        """Raise [`OrdMoEConfigError`] for a value that cannot be."""
        check_whole_numbers(step=self.step, first_sample=self.first_sample)
        if self.num_samples is not None:
            check_whole_numbers(num_samples=self.num_samples)
            if self.num_samples < 1:
                raise OrdMoEConfigError(f"num_samples must be at least 1, got {self.num_samples}.")


@dataclass(frozen=True)
class TierPlan:
    """Which tier each row of a forward is on, or each of its positions.

    Args:
        tiers (`torch.Tensor` of shape `(n,)` or `(n, S)`): a tier, from 1, for each row, or for each position of each
            row; positions past the last column, which generation appends, are on the last column's. Fewer tiers than
            rows are each repeated over as many consecutive rows as fit, as generation repeats its prompts.
        settings ([`TierSettings`]): how tiers are cut.
        layers (`frozenset[int]`): indices of the MoE layers in scope; the others route as usual.
        routers_of_layer (`tuple` of `dict[int, int]`): for each block in scope, or blocks that share tokens out by
            their modality, the id of each of its routers → the index of its MoE layer in the model that was asked for,
            which `random` draws from. A part of a model counts its own layers.
        draw ([`RandomDraw`]): what `random` grouping draws.
        cache (`dict`): what forwards have made of the tiers, for those to come.
    """

    tiers: torch.Tensor
    settings: TierSettings
    layers: frozenset[int]
    draw: RandomDraw = RandomDraw()
    routers_of_layer: tuple[dict[int, int], ...] = field(default=(), repr=False)
    cache: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def is_top(self) -> bool:
        """Whether all rows are on tier 1, which is the model as it is."""
        return self.draw.positions is None and bool((self.tiers == 1).all())

    @property
    def is_random(self) -> bool:
        """Whether the tiers below the first are drawn."""
        return self.settings.grouping == "random"

    @cached_property
    def only_tier(self) -> int | None:
        """The one tier given for all rows; `None` where several were, whose number is then checked against the rows."""
        return self.tiers.item() if self.tiers.numel() == 1 else None

    @property
    def needs_positions(self) -> bool:
        """Whether a token's experts depend on its position in the whole sequence, the cached part included."""
        return self.tiers.dim() == 2 or (self.is_random and self.draw.positions is None)

    @property
    def needs_rows(self) -> bool:
        """Whether a token's experts depend on which row it is in."""
        return self.only_tier is None or self.is_random

    def tier_of_token(self, num_rows: int, sequence_length: int, past_length: int = 0) -> torch.Tensor:
        """The tier of each of a forward's tokens, rows after one another (`torch.Tensor` of shape `(T,)`).

        Args:
            num_rows (`int`), sequence_length (`int`): rows of this forward, and positions of each.
            past_length (`int`): positions before them, in a cache.
        """
        rows_each = self.rows_per_tier(num_rows)
        if self.tiers.dim() == 1:
            return self.tiers.repeat_interleave(rows_each * sequence_length)
        columns = torch.arange(past_length, past_length + sequence_length).clamp(max=self.tiers.shape[1] - 1)
        return self.tiers[:, columns].repeat_interleave(rows_each, dim=0).reshape(-1)

    def rows_per_tier(self, num_rows: int) -> int:
        """Number of consecutive rows of a forward that each of the tiers given is for.

        Raises:
            [`OrdMoERuntimeError`]: the rows cannot be shared out over the tiers.
        """
        rows_each, rest = divmod(num_rows, len(self.tiers))
        if rest or not rows_each:
            raise OrdMoERuntimeError(
                f"tier_routing was given {len(self.tiers)} tiers, but a forward came with {num_rows} rows. Give one "
                "tier for all rows, or one for each."
            )
        return rows_each

    def of_layers(self, layers: Sequence[MoELayer]) -> "TierPlan":
        """The plan for a text model that has these of the layers, in scope or not."""
        by_module: dict[str, dict[int, int]] = {}
        for layer in layers:
            parent = layer.block_name.rpartition(".")[0]
            # Blocks in one module of a decoder layer are of one modality each, as of text and of images.
            is_shared = parent.startswith(f"{layer.decoder_layers_name}.{layer.decoder_layer}.")
            together = parent if is_shared else layer.block_name
            by_module.setdefault(together, {})[id(layer.router)] = layer.index
        in_scope = [routers for routers in by_module.values() if self.layers & {*routers.values()}]
        return replace(self, routers_of_layer=tuple(in_scope))

    @cached_property
    def index_of_router(self) -> dict[int, int]:
        """Id of each router in scope, and of others beside it → the index of its MoE layer."""
        return {router: index for routers in self.routers_of_layer for router, index in routers.items()}

    def check_all_ran(self, routed: set[int]) -> None:
        """See that each block in scope was held to its tiers, given the ids of the routers that ran.

        Of blocks that have a modality each (ERNIE-4.5-VL), those run that have tokens.

        Raises:
            [`OrdMoERuntimeError`]: some did not.
        """
        silent = [
            index for routers in self.routers_of_layer if not routers.keys() & routed for index in routers.values()
        ]
        if silent:
            raise OrdMoERuntimeError(
                f"The routers of the MoE layers {silent} did not run in this forward, so it was not held to its tiers "
                "there: something replaced the forward of their blocks (a kernel, a patch), or passed them over. Take "
                "that off, or leave these layers out of layer_scope."
            )


def layers_in_scope(layer_scope: str | Sequence[int], num_layers: int) -> frozenset[int]:
    """The indices of the MoE layers that `layer_scope` names.

    Raises:
        [`OrdMoEConfigError`]: an unknown name, an index that the model does not have, or no layer at all.
    """
    half = num_layers // 2
    scopes = {"all": range(num_layers), "shallow": range(half), "deep": range(half, num_layers)}
    is_list = isinstance(layer_scope, Collection) and all(type(index) is int for index in layer_scope)
    if layer_scope not in scopes if isinstance(layer_scope, str) else not is_list:
        raise OrdMoEConfigError(
            f"layer_scope must be one of {LAYER_SCOPES} or a list of MoE layer indices, got {layer_scope!r}."
        )
    layers = frozenset(scopes[layer_scope] if isinstance(layer_scope, str) else layer_scope)
    outside = sorted(layers - {*range(num_layers)})
    if outside or not layers:
        raise OrdMoEConfigError(
            f"layer_scope={layer_scope!r} names {f'the MoE layers {outside}' if outside else 'no MoE layer'}, but the "
            f"model has {num_layers}, from 0 to {num_layers - 1}."
        )
    return layers


def _as_tiers(tier: Any) -> torch.Tensor:
    """Tiers as they were given (`torch.Tensor` of shape `(n,)` or `(n, S)`, int64)."""
    try:
        tiers = torch.as_tensor(tier)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OrdMoEConfigError(
            f"tier must be a whole number, or one for each row or position, got {tier!r}."
        ) from error
    is_whole = not (tiers.is_floating_point() or tiers.is_complex() or tiers.dtype == torch.bool)
    if tiers.dim() > 2 or (tiers.numel() and not is_whole):
        raise OrdMoEConfigError(
            f"tier must be a whole number, or one for each row or position, got {tiers.dtype} of shape "
            f"{tuple(tiers.shape)}."
        )
    tiers = tiers.cpu().long().clone()  # what the caller does with its own later does not count
    return tiers if tiers.dim() == 2 else tiers.reshape(-1)


def check_whole_numbers(**values: Any) -> None:
    """Raise [`OrdMoEConfigError`] if one of `values` is no whole number."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise OrdMoEConfigError(f"{name} must be a whole number, got {value!r}.")


def make_plan(
    layers: list[MoELayer],
    tier: int | Sequence[int] | torch.Tensor,
    settings: TierSettings,
    draw: RandomDraw = RandomDraw(),
) -> TierPlan:
    """Check a request against the model's MoE layers and make it a plan.

    Raises:
        [`OrdMoEConfigError`]: a tier outside 1…C, C·K > E in a layer in scope, or an unknown grouping or scope.
    """
    settings.check()
    draw.check()
    tiers = _as_tiers(tier)
    if tiers.numel() == 0 or not ((tiers >= 1) & (tiers <= settings.num_tiers)).all():
        raise OrdMoEConfigError(
            f"tier must be from 1 (the top) to num_tiers={settings.num_tiers}, got {tiers.tolist()}."
        )
    scope = layers_in_scope(settings.layer_scope, len(layers))
    for index in sorted(scope):
        check_tiers_fit(settings.num_tiers, layers[index].num_experts, layers[index].top_k, layers[index].block_name)
    return TierPlan(tiers, settings, scope, draw)
