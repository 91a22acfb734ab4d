"""Whether an adapter still does what it did when it was saved: its probes, replayed."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from peft import PeftModel

from ..adapter.probes import replay
from ..errors import OrdMoEConfigError, OrdMoEModelError
from .tables import Table, number


# In nats, of a tier's median token. On the shipped base bf16 in place of fp32 makes 0.13; no adapter, its experts in
# another order, or the order of other tools at least 0.41. The mean says less: a token may go to another expert.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Deviation:
    """How far a tier's log-probabilities are from those that were saved, in nats per token.

    Args:
        tier (`int`): the tier.
        saved (`float`), found (`float`): mean log-probability of a token.
        median (`float`), mean (`float`), largest (`float`): the absolute differences.
    """

    tier: int
    saved: float
    found: float
    median: float
    mean: float
    largest: float


def check_probes(record: dict[str, Any], adapter: str) -> None:
    """Raise [`OrdMoEConfigError`] for an adapter whose `ordmoe.json` has no probes."""
    if record["probes"] is None or not record["probes"]["log_probs"]:
        raise OrdMoEConfigError(
            f"{adapter} has no probes: it was imported, or saved without its model at hand (sharded, or from a "
            "state_dict), or its model does not run on tokens alone. Load it, check what it answers, and save it by "
            "`save_pretrained`."
        )


def replay_probes(model: PeftModel, record: dict[str, Any], adapter: str) -> list[Deviation]:
    """Run the probes in `ordmoe.json` again, tier by tier.

    Args:
        model ([`~peft.PeftModel`]): the adapter on a base.
        record (`dict`): the adapter's `ordmoe.json`.
        adapter (`str`): where it is, for messages.

    Raises:
        [`OrdMoEConfigError`]: it has no probes.
        [`OrdMoEModelError`]: they have tokens that the model does not have.
    """
    check_probes(record, adapter)
    probes = record["probes"]
    largest, known = max(map(max, probes["token_ids"])), len(model.get_input_embeddings().weight)
    if largest >= known:
        raise OrdMoEModelError(
            f"The probes of {adapter} have token {largest}, and this model has {known} tokens: it is another base."
        )
    saved = {int(tier): torch.tensor(rows) for tier, rows in probes["log_probs"].items()}
    again = replay(model, probes["token_ids"], len(saved))
    deviations = []
    for tier, saved_BS in saved.items():
        found_BS = torch.tensor(again[str(tier)])
        apart_BS = (found_BS - saved_BS).abs().nan_to_num(nan=torch.inf)
        values = (saved_BS.mean(), found_BS.mean(), apart_BS.median(), apart_BS.mean(), apart_BS.max())
        deviations.append(Deviation(tier, *(float(value) for value in values)))
    return deviations


def deviation_table(deviations: list[Deviation], adapter: str) -> Table:
    """A row for each tier."""
    rows = [(d.tier, d.saved, d.found, d.median, d.mean, d.largest) for d in deviations]
    columns = ("tier", "saved", "found", "median difference", "mean", "largest")
    return Table(
        f"{adapter}: log-probability of the probes' tokens, in nats",
        pd.DataFrame(rows, columns=columns),
        dict.fromkeys(columns[1:], number),
    )
