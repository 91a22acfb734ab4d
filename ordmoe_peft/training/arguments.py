"""Arguments of the trainer."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..errors import OrdMoEConfigError


@dataclass
class OrdMoETrainingArguments(SFTConfig):
    """[`~trl.SFTConfig`] and the weights of OrdMoE's two further losses.

    The total is `L_NTP + erl_coef · L_ERL + balance_coef · L_balance`.

    Args:
        erl_coef (`float`, defaults to 0.01): λ_ERL, the weight of the expert-rank loss. The loss is unbounded below:
            0.1 already lowered tier 1's accuracy in experiments with easy-VQA.
        balance_coef (`float`, defaults to 0.001): λ_bal, the weight of the load-balancing loss of the tier-1 rows. It
            takes the place of TRL's `router_aux_loss_coef`, which must stay unset or 0.
        lower_tier_floor (`float` or `"uniform"`, *optional*): a token whose log-probability under a tier of negative
            advantage is below this gives no gradient; `"uniform"` is −ln V. None, the paper's loss, by default.

    Raises:
        [`OrdMoEConfigError`]: a value that cannot work.
    """

    erl_coef: float = field(default=0.01, metadata={"help": "Weight of the expert-rank loss."})
    balance_coef: float = field(
        default=0.001, metadata={"help": "Weight of the load-balancing loss, over tier-1 rows alone."}
    )
    lower_tier_floor: str | None = field(
        default=None,
        metadata={
            "help": "Log-probability below which a token under a tier of negative advantage gives no gradient: a "
            "number, or 'uniform' for that of a uniform guess. Not set: the paper's loss."
        },
    )

    def __post_init__(self):
        if self.router_aux_loss_coef:
            raise OrdMoEConfigError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} would add a second balance loss, over all tiers. "
                "Set balance_coef instead and leave router_aux_loss_coef unset."
            )
        self.router_aux_loss_coef = 0.0
        for name in ("erl_coef", "balance_coef"):
            if getattr(self, name) < 0:
                raise OrdMoEConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.lower_tier_floor not in (None, "uniform"):
            try:
                self.lower_tier_floor = float(self.lower_tier_floor)
            except ValueError as error:
                raise OrdMoEConfigError(
                    f"lower_tier_floor must be a log-probability or 'uniform', got {self.lower_tier_floor!r}."
                ) from error
            if self.lower_tier_floor > 0:
                raise OrdMoEConfigError(
                    f"lower_tier_floor is a log-probability, so at most 0, got {self.lower_tier_floor}."
                )
        super().__post_init__()
