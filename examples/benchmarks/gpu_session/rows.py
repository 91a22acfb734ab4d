"""A row of the table, and how large what is run is."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ordmoe_peft.errors import OrdMoEError

from ..layers import QWEN3_30B, Layer


OK, MEASURED, FAILED = "ok", "-", "failed"


@dataclass(frozen=True)
class Row:
    """What one case gave.

    Args:
        case (`str`), figure (`str`): what was run, and what was seen, with its unit.
        verdict (`str`, defaults to "-"): "ok", "failed: why" or "not available: why", where there is one.
        numbers (`dict`, *optional*): the figure's numbers, for programs.
        section (`str`, *optional*): the letter.
    """

    case: str
    figure: str
    verdict: str = MEASURED
    numbers: dict[str, float] = field(default_factory=dict)
    section: str = ""

    @property
    def has_failed(self) -> bool:
        return self.verdict.startswith(FAILED)

    def cells(self) -> list[str]:
        return [f"{self.section}: {self.case}", self.figure, self.verdict]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Section = Callable[["Size", str], Iterator[Row]]


def verdict(is_right: bool, otherwise: str) -> str:
    """ "ok", or that it failed and how."""
    return OK if is_right else f"{FAILED}: {otherwise}"


def tried(case: str, measure: Callable[[], Row]) -> Row:
    """What `measure` gives; where an operation fails, a row that says so, and the section goes on."""
    try:
        return measure()
    except (RuntimeError, OrdMoEError) as error:
        return Row(case, "", f"{FAILED}: {last_line(str(error))}")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


@dataclass(frozen=True)
class Size:
    """How large what is run is.

    Args:
        layer ([`~examples.benchmarks.layers.Layer`]): the experts of sections b, c and d.
        tokens (`tuple` of `int`): how many go through them in b; the middle one in c and d.
        model (`dict`): what a `Qwen3MoeConfig` takes, of sections d to g.
        batch (`tuple` of `int`): rows and tokens of a training batch.
        new_tokens (`int`): that are generated.
        repetitions (`int`): of what is timed.
        is_thorough (`bool`): whether sections a and c run all dtypes and routings.
    """

    layer: Layer
    tokens: tuple[int, ...]
    model: dict[str, Any]
    batch: tuple[int, int]
    new_tokens: int
    repetitions: int
    is_thorough: bool


# Six layers of Qwen3-30B-A3B, by its config.json, which has 48.
QWEN3_30B_MODEL = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}
TOY_MODEL = QWEN3_30B_MODEL | {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
SIZES = {
    "toy": Size(Layer(8, 2, 64, 64, 48), (24, 48), TOY_MODEL, (2, 32), 4, 1, False),
    "real": Size(QWEN3_30B, (512, 2048, 4096), QWEN3_30B_MODEL, (1, 2048), 48, 7, True),
}
