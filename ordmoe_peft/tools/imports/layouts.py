"""How files hold LoRA on the experts of a stack, and how the layout is told.

For E experts with matrices (O, I), on disk in `lora_A` and `lora_B`:

    peft        (E·r, I) and (O, r·E)  PEFT from 0.19.1; experts are the fast index of lora_B's columns
    peft-0.18   (E·r, O) and (I, r·E)  PEFT up to 0.19.0: the stack was taken for (E, I, O). Up to 0.18 stacks that are
                                       stored as (E, I, O) have PEFT's layout of today
    unsloth     columns of lora_B in blocks of r for each expert, rows of lora_A as PEFT's of that time has them;
                until unsloth_zoo #1269. Since #1232 `lora_B_layout` in adapter_config.json says which it is
    per-expert  a pair of matrices for each expert and linear layer

The first two differ in which side is O, the third in the order of columns, which shapes do not show.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from ...errors import OrdMoEConfigError
from ..lora_factors import Factors
from .places import Place


SOURCE_LAYOUTS = ("auto", "peft", "peft-0.18", "unsloth", "per-expert")
# The values of Unsloth's tag: experts as the fast index of lora_B's columns, or as the slow one.
TAGS = {"rank_major": False, "grouped_by_expert": True}


@dataclass(frozen=True)
class FusedLayout:
    """How a file holds the experts of stacks.

    Args:
        is_reversed (`bool`): `lora_A` has the side O.
        is_expert_slowest (`bool`): columns of `lora_B` come in blocks, one for each expert.
    """

    is_reversed: bool
    is_expert_slowest: bool

    def factors(self, A: torch.Tensor, B: torch.Tensor, place: Place, scaling: float) -> Factors:
        """The update that two matrices of a file are."""
        num_experts = place.shape[0]
        if self.is_expert_slowest:
            B = B.reshape(B.shape[0], num_experts, -1).transpose(1, 2)
        factors = Factors.from_peft(A, B.reshape(B.shape[0], -1), num_experts, scaling)
        return factors.transposed() if self.is_reversed else factors


def told_layout(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor, Place]], settings: Mapping[str, Any], asked: str, hints: str
) -> FusedLayout:
    """The layout of the stacks in a file.

    Args:
        pairs (`Mapping`): name → `lora_A`, `lora_B`, and the stack that they are for.
        settings (`Mapping`): the file's `adapter_config.json`.
        asked (`str`): one of `SOURCE_LAYOUTS` but `per-expert`.
        hints (`str`): words that came with the adapter, in which "unsloth" may stand.

    Raises:
        [`OrdMoEConfigError`]: it cannot be told, or is not what was asked for.
    """
    is_slowest = _is_expert_slowest(pairs, settings, asked, hints)
    fits = {name: _sides(*pair) for name, pair in pairs.items()}
    for name, (A, B, place) in pairs.items():
        if not any(fits[name]) or A.shape[0] != B.shape[1] or A.shape[0] % place.shape[0]:
            num_experts, rows, columns = place.shape
            raise OrdMoEConfigError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no factors of {num_experts} experts "
                f"of {rows} by {columns}, which {place.weight} has. Give the base that the adapter was trained on."
            )
    if asked in ("peft", "peft-0.18"):
        reversed_ = {name: asked == "peft-0.18" and not pair[2].is_transposed for name, pair in pairs.items()}
        wrong = [name for name, is_reversed in reversed_.items() if not fits[name][is_reversed]]
        if wrong:
            raise OrdMoEConfigError(f"{wrong[0]} does not have the shapes of source_layout={asked!r}. Pass 'auto'.")
        return FusedLayout(any(reversed_.values()), is_slowest)
    possible = {is_reversed for is_reversed in (False, True) if all(sides[is_reversed] for sides in fits.values())}
    if len(possible) == 2:
        possible = _by_version(settings.get("peft_version"), pairs) or possible
    if len(possible) != 1:
        raise OrdMoEConfigError(
            "The adapter's matrices fit the experts both ways round, and peft_version in its adapter_config.json does "
            "not say which PEFT wrote them. Pass --source_layout peft for PEFT from 0.19.1, or peft-0.18 for earlier "
            "ones."
            if possible
            else "Some of the adapter's matrices fit the experts one way round alone, and some the other: no PEFT "
            "wrote that. Save the adapter again with one version of PEFT."
        )
    return FusedLayout(possible.pop(), is_slowest)


def _sides(A: torch.Tensor, B: torch.Tensor, place: Place) -> tuple[bool, bool]:
    """Whether the matrices fit with I on A's side, and with O there."""
    _, out_features, in_features = place.shape
    sides = (A.shape[1], B.shape[0])
    return sides == (in_features, out_features), sides == (out_features, in_features)


def _by_version(version: str | None, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor, Place]]) -> set[bool]:
    """Whether the PEFT of a version writes the stacks the other way round; nothing where that is not known."""
    try:
        parsed = Version(str(version).partition("@")[0])
    except InvalidVersion:
        return set()
    release = parsed.release
    if parsed.is_prerelease and (0, 18) < release <= (0, 19, 1):  # it changed between commits of one such version
        return set()
    if release >= (0, 19, 1):
        return {False}
    return {release >= (0, 19) or not place.is_transposed for *_, place in pairs.values()}


def _is_expert_slowest(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor, Place]], settings: Mapping[str, Any], asked: str, hints: str
) -> bool:
    tag = settings.get("lora_B_layout")
    if tag is not None and tag not in TAGS:
        raise OrdMoEConfigError(f"lora_B_layout in adapter_config.json is {tag!r}, known are {tuple(TAGS)}.")
    if tag is not None:
        if asked != "auto" and TAGS[tag] != (asked == "unsloth"):
            raise OrdMoEConfigError(
                f"source_layout={asked!r}, but lora_B_layout in adapter_config.json is {tag!r}. Pass 'auto'."
            )
        return TAGS[tag]
    is_either = all(A.shape[0] == place.shape[0] or place.shape[0] == 1 for A, _, place in pairs.values())
    if asked == "auto" and "unsloth" in hints.lower() and not is_either:
        raise OrdMoEConfigError(
            "The adapter seems to be Unsloth's, and adapter_config.json has no lora_B_layout, so the order of lora_B's "
            "columns cannot be told. Pass --source_layout unsloth for one trained before unsloth_zoo #1269 (September "
            "2026), or peft for one trained after it or by PEFT."
        )
    return asked == "unsloth"
