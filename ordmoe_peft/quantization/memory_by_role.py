"""How many bytes of a model are in how many bits, by what they are for.

What counts is memory: each storage that a parameter, a buffer, or the scales and code tables of a packed weight are in,
whole, and once however many of them share it. So a count on the meta device is what a loaded model holds, to the byte.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .._compat import storage_id
from ..errors import OrdMoEModelError
from ..moe_model import MoELayer, MoEModel, without_wrappers
from .offloaded import is_in_ram
from .selection import is_of_router
from .storage import is_packed, logical_shape, stored_tensors


CENSUS_ROLES = (
    "experts",
    "expert_biases",
    "shared_experts",
    "router",
    "attention",
    "embeddings",
    "head",
    "norms",
    "vision",
    "adapter",
    "other",
)


@dataclass(frozen=True)
class CensusRow:
    """What a model holds of one role in one dtype.

    Args:
        role (`str`): one of `CENSUS_ROLES`.
        dtype (`str`): `"nf4"`, `"fp4"`, or the tensors' dtype; `"nf4 in RAM"` for stacks that stay there
            (`offload_experts`), whose places on the device are no part of the model.
        tensors (`int`): how many.
        weights (`int`): the numbers that they stand for.
        bytes (`int`): what they take, for 4-bit tensors with their scales and code tables.
    """

    role: str
    dtype: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales and tables included."""
        return 8 * self.bytes / max(self.weights, 1)


@dataclass(frozen=True)
class QuantizationCensus:
    """Everything that a model holds, by role and dtype; prints as a table."""

    rows: list[CensusRow]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def of(self, role: str) -> dict[str, int]:
        """Bytes by dtype of one role."""
        return {row.dtype: row.bytes for row in self.rows if row.role == role}

    def summary(self) -> str:
        """One line: the total, and the experts' bytes by dtype."""
        experts = ", ".join(f"{in_units(count)} of experts in {dtype}" for dtype, count in self.of("experts").items())
        return f"{in_units(self.bytes)} in all, {experts or 'no experts'}."

    def __str__(self) -> str:
        tensors, weights = sum(row.tensors for row in self.rows), sum(row.weights for row in self.rows)
        rows = [*self.rows, CensusRow("all", "", tensors, weights, self.bytes)]
        header = f"{'role':<16}{'dtype':<10}{'tensors':>9}{'weights':>18}{'bytes':>18}{'bits a weight':>15}"
        lines = [
            f"{row.role:<16}{row.dtype:<10}{row.tensors:>9,}{row.weights:>18,}{row.bytes:>18,}{row.bits:>15.2f}"
            for row in rows
        ]
        return "\n".join([header, *lines])


def quantization_census(model: nn.Module) -> QuantizationCensus:
    """Count what `model`'s parameters and buffers hold, each storage once, by role and dtype.

    Args:
        model (`nn.Module`): any model of transformers, or a [`~peft.PeftModel`] on one.
    """
    role_of = role_finder(model)
    counted: set[int] = set()
    counts: dict[tuple[str, str], Counter] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        dtype = tensor.quant_state.quant_type if is_packed(tensor) else str(tensor.dtype).removeprefix("torch.")
        dtype += " in RAM" * is_in_ram(tensor)
        storages = {storage_id(part.untyped_storage()): part.untyped_storage() for part in stored_tensors(tensor)}
        num_bytes = sum(storage.nbytes() for key, storage in storages.items() if key not in counted)
        counted.update(storages)
        row = counts.setdefault((role_of(without_wrappers(name)), dtype), Counter())
        row.update({"tensors": 1, "weights": logical_shape(tensor).numel(), "bytes": num_bytes})
    rows = [CensusRow(role, dtype, **count) for (role, dtype), count in counts.items()]
    return QuantizationCensus(sorted(rows, key=lambda row: (CENSUS_ROLES.index(row.role), row.dtype)))


def in_units(count: int) -> str:
    """Bytes in GB or MB, decimal as on a card's box."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def role_finder(model: nn.Module) -> Callable[[str], str]:
    """A function from the full name of a parameter, without PEFT's wrappers, to its role."""
    try:
        layers = MoEModel.of(model).all_layers
    except OrdMoEModelError:
        layers = []
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    attention = tuple(
        f"{name}." for name, module in modules.items() if "Attention" in type(module).__name__ or name.endswith("attn")
    )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def role_of(parameter_name: str) -> str:
        name = parameter_name.rpartition(".")[0]
        if "lora_" in parameter_name:
            return "adapter"
        module = modules[name]
        if any(name.startswith(f"{layer.decoder_layers_name}.") for layer in layers):
            return _role_in_decoder(parameter_name, module, layers, attention)
        if any(part.startswith(("visual", "vision")) for part in name.split(".")):
            return "vision"
        if module is head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embeddings"
        return "norms" if _is_norm(module) else "other"

    return role_of


def _role_in_decoder(parameter_name: str, module: nn.Module, layers: list[MoELayer], attention: tuple[str, ...]) -> str:
    name, _, own_name = parameter_name.rpartition(".")
    if any(is_of_router(name, module, layer) for layer in layers):
        return "router"
    if _is_norm(module):
        return "norms"
    for layer in layers:
        is_stack = parameter_name in {f"{layer.experts_name}.{projection}" for projection in layer.projections}
        # Where several children of a block hold its experts, it has others, too.
        holds_others = layer.experts_name == layer.block_name and name != layer.block_name
        if is_stack or (f"{name}.".startswith(f"{layer.experts_name}.") and not holds_others):
            is_weight = is_stack or (layer.kind == "modules" and "bias" not in own_name)
            return "experts" if is_weight else "expert_biases"
    if "shared" in name:
        return "shared_experts"
    return "attention" if f"{name}.".startswith(attention) else "other"


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
