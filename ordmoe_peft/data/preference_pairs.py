"""Rollouts as preferences: what a high tier wrote over what a lower tier wrote, in TRL's preference format."""

from itertools import combinations

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers.utils import logging

from ..errors import OrdMoEConfigError, OrdMoEDataError
from .shards import without_inner_bars


logger = logging.get_logger(__name__)

PAIRS = ("ends", "all")
MESSAGES = List({"role": Value("string"), "content": Value("string")})


def to_preference_pairs(
    dataset: Dataset,
    *,
    chosen_tier: int = 1,
    rejected_tier: int | None = None,
    drop_equal: bool = True,
    pairs: str = "ends",
) -> Dataset:
    """Rollouts in TRL's preference format: `prompt`, `chosen`, `rejected`, and `images` or `image` where there are any.

    Responses to conversational prompts become assistant messages, without the white space around them, which is the
    chat template's to add; others stay the strings they are. The tiers of a pair are in the columns `chosen_tier` and
    `rejected_tier`.

    Args:
        dataset ([`~datasets.Dataset`]): what [`~ordmoe_peft.data.rollouts.rollout`] wrote.
        chosen_tier (`int`, defaults to 1): the highest tier to take.
        rejected_tier (`int`, *optional*): the lowest tier to take; the last there is by default.
        drop_equal (`bool`, defaults to `True`): leave out pairs of equal texts, which say nothing; a warning says how
            many there were.
        pairs (`str`, defaults to `"ends"`): `"ends"` pairs these two tiers; `"all"` pairs every tier from one to the
            other with every lower one.

    Raises:
        [`OrdMoEDataError`]: these are no rollouts, or no pair is left.
        [`OrdMoEConfigError`]: a tier that was not rolled out, or is not below `chosen_tier`.
    """
    missing = {"prompt", "tiers", "responses"} - set(dataset.column_names)
    if missing or len(dataset) == 0:
        raise OrdMoEDataError(f"These are no rollouts: {sorted(missing) or 'rows'} missing. Make them with rollout().")
    tier_pairs = _tier_pairs(list(dataset[0]["tiers"]), chosen_tier, rejected_tier, pairs)
    is_conversational = not isinstance(dataset[0]["prompt"], str)
    indices, rows, dropped = [], [], 0
    for index, row in enumerate(dataset.select_columns(["tiers", "responses"])):
        responses = [text.strip() for text in row["responses"]] if is_conversational else row["responses"]
        text_of = dict(zip(row["tiers"], responses, strict=True))
        for chosen, rejected in tier_pairs:
            if drop_equal and text_of[chosen] == text_of[rejected]:
                dropped += 1
                continue
            indices.append(index)
            texts = {"chosen": text_of[chosen], "rejected": text_of[rejected]}
            if is_conversational:
                texts = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
            rows.append({**texts, "chosen_tier": chosen, "rejected_tier": rejected})
    if not rows:
        raise OrdMoEDataError(f"All {dropped} pairs have equal texts: the tiers wrote the same, so there is no signal.")
    if dropped:
        logger.warning(f"Left out {dropped} of {dropped + len(rows)} pairs, whose two texts are equal.")
    kept = [name for name in dataset.column_names if name in ("prompt", "images", "image")]
    text_type = MESSAGES if is_conversational else Value("string")
    types = {"chosen": text_type, "rejected": text_type, "chosen_tier": Value("int32"), "rejected_tier": Value("int32")}
    written = Dataset.from_list(rows, features=Features(types))
    with without_inner_bars():
        return concatenate_datasets([dataset.select(indices).select_columns(kept), written], axis=1)


def _tier_pairs(tiers: list[int], chosen: int, rejected: int | None, pairs: str) -> list[tuple[int, int]]:
    rejected = tiers[-1] if rejected is None else rejected
    if pairs not in PAIRS:
        raise OrdMoEConfigError(f"pairs must be one of {PAIRS}, got {pairs!r}.")
    for name, tier in (("chosen_tier", chosen), ("rejected_tier", rejected)):
        if tier not in tiers:
            raise OrdMoEConfigError(f"{name}={tier}, but the rollouts are of tiers {tiers}.")
    if chosen >= rejected:
        raise OrdMoEConfigError(f"rejected_tier={rejected} must be a lower tier than chosen_tier={chosen}: further on.")
    if pairs == "ends":
        return [(chosen, rejected)]
    return list(combinations([tier for tier in tiers if chosen <= tier <= rejected], 2))
