"""What LoRA on experts and routers costs in a training step, against the frozen model's own forward and backward.

    python -m examples.benchmarks.expert_step --shapes wide --dtypes bfloat16 --bases dense nf4

The floor runs the frozen base on transformers' `grouped_mm`, forward and back to the embeddings, without any LoRA. On a
4-bit base it cannot run, so the budget there is the dense floor and the time in which bitsandbytes unpacks each expert
that tokens hit, once for forward (twice with gradient checkpointing, which runs it twice) and once for backward. All
variants of a cell take turns in one process, and ratios are medians over turns. Memory is what some steps add to the
loaded model, in a process for each variant, as the system and as torch counts it. Each is on another batch, as in
training: in 16 bits oneDNN compiles kernels for each number of rows that an expert gets, and keeps them. See
`subjects.py` for the shapes.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import HfArgumentParser

from ordmoe_peft.cli.tables import print_table
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.storage import expert_unpacker

from .measuring import by_turns, in_own_process, peak_of, print_cpu, resident_peak_of
from .subjects import DTYPES, SHAPES, VARIANTS, Shape, batch, build_base, step, variant


BASES = ("dense", "nf4")
FLOOR, OURS, UNPACKING = "floor", "ours", "unpacking alone"


@dataclass
class Options:
    """What to compare."""

    shapes: list[str] = field(default_factory=lambda: ["small", "wide", "mixtral", "skewed"])
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))
    bases: list[str] = field(default_factory=lambda: list(BASES))
    checkpointing: list[str] = field(default_factory=lambda: ["off", "on"], metadata={"help": "off, on, or both."})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": f"Of {list(VARIANTS)}."})
    repetitions: int = field(default=5, metadata={"help": "Timed steps of each variant."})
    memory: bool = field(default=True, metadata={"help": "Measure memory, too."})
    memory_steps: int = field(default=3, metadata={"help": "Steps, each on another batch, whose peak is the memory."})
    profile: bool = field(default=False, metadata={"help": "Print a table by operator of ours in place of timing."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda; on cuda choose the shapes 30b_2k and 30b_8k."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; all by default."})


@dataclass(frozen=True)
class Cell:
    """One table: a shape in a dtype, on a base, with or without gradient checkpointing."""

    shape_name: str
    dtype_name: str
    base: str
    checkpointing: bool
    device: str
    threads: int | None

    def __str__(self) -> str:
        checkpointing = ", gradient checkpointing" if self.checkpointing else ""
        return f"{self.shape_name}, {self.dtype_name}, {self.base} base{checkpointing}: {self.shape}"

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    def build(self, nf4: bool) -> nn.Module:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return build_base(self.shape, DTYPES[self.dtype_name], nf4, self.device)

    def serves(self, name: str) -> bool:
        """PEFT's own LoRA does not run on packed experts."""
        return self.base == "dense" or name in (FLOOR, OURS)

    def is_packed(self, name: str) -> bool:
        return self.base == "nf4" and name != FLOOR


def main() -> None:
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    print_cpu()
    warnings.simplefilter("ignore", FutureWarning)  # on both libraries' names for gradient checkpointing
    for shape, dtype, base, checkpointing in itertools.product(
        options.shapes, options.dtypes, options.bases, options.checkpointing
    ):
        cell = Cell(shape, dtype, base, checkpointing == "on", options.device, options.threads)
        if options.profile:
            in_own_process(profile, cell)
        else:
            compare(cell, [name for name in options.variants if cell.serves(name)], options)


def compare(cell: Cell, names: list[str], options: Options) -> None:
    """Print the table of a cell."""
    times = in_own_process(time_steps, cell, names, options.repetitions)
    memories = memory_by_measure(cell, names, options.memory_steps) if options.memory else {}
    budget = times[FLOOR] + times[UNPACKING] if UNPACKING in times else times[FLOOR]
    rows = [
        [
            name,
            str(times[name]),
            f"{times[name].over(budget):.2f}",
            *itertools.chain(*(_over_floor(memory, name) for memory in memories.values())),
        ]
        for name in times
    ]
    against = "floor" if cell.base == "dense" else "(floor + unpacking)"
    columns = itertools.chain(*((f"MB {measure}", "/ floor") for measure in memories))
    print_table(f"\n{cell}", ["", "median [min, max]", f"/ {against}", *columns], rows)
    if OURS in names and options.memory:
        gradients = in_own_process(gradients_of, cell)
        print(f"MB over the loaded model; the adapter's gradients alone are {gradients / 1e6:.0f} MB.")


def _over_floor(memory: dict[str, int], name: str) -> list[str]:
    return [f"{memory[name] / 1e6:.0f}", f"{memory[name] / memory[FLOOR]:.2f}"] if name in memory else ["", ""]


def time_steps(cell: Cell, names: list[str], repetitions: int) -> dict:
    """Times of a step of each variant and, on a 4-bit base, of unpacking all experts that were hit."""
    bases = {packed: cell.build(packed) for packed in {cell.is_packed(name) for name in names}}
    inputs = batch(cell.shape, cell.device)
    models = {name: variant(bases[cell.is_packed(name)], name, cell.checkpointing) for name in names}
    functions = {name: lambda model=model: step(model, inputs) for name, model in models.items()}
    if True in bases:
        hit = experts_hit(models[OURS], inputs)
        functions[UNPACKING] = lambda: [unpack_all(bases[True], hit) for _ in range(3 if cell.checkpointing else 2)]
    return by_turns(functions, repetitions, cell.device)


def memory_by_measure(cell: Cell, names: list[str], num_steps: int) -> dict[str, dict[str, int]]:
    """Bytes that steps add to the loaded model, by name: what the process holds, and on CPU what torch counts, which
    has neither malloc's gaps nor oneDNN's kernels."""
    measures = {"resident": resident_peak_of, "counted": peak_of}
    if cell.device == "cuda":
        del measures["resident"]
    return {
        measure: {name: in_own_process(memory_of, cell, name, num_steps, function) for name in names}
        for measure, function in measures.items()
    }


def memory_of(cell: Cell, name: str, num_steps: int, measure: Callable[[Callable], int]) -> int:
    """Bytes that steps add to the loaded model, without what libraries load and set up at their first use."""
    small = SHAPES["tiny"]
    model = variant(build_base(small, DTYPES[cell.dtype_name], cell.is_packed(name), cell.device), name)
    step(model, batch(small, cell.device))
    batches = [batch(cell.shape, cell.device, seed) for seed in range(num_steps)]
    model = variant(cell.build(cell.is_packed(name)), name, cell.checkpointing)
    return measure(lambda: [step(model, inputs) for inputs in batches])


def gradients_of(cell: Cell) -> int:
    """Bytes of the gradients that a step of ours leaves."""
    parameters = variant(cell.build(nf4=False), OURS).parameters()
    return sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)


def experts_hit(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """For each MoE layer, the experts that some token of `inputs` goes to."""
    hit = []
    handles = [
        layer.router.register_forward_hook(lambda _, __, out: hit.append(out[2].unique().tolist()))
        for layer in MoEModel.of(model).layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return hit


def unpack_all(model: nn.Module, hit: list[list[int]]) -> None:
    for layer, experts in zip(MoEModel.of(model).layers, hit, strict=True):
        for projection in layer.projections:
            unpack = expert_unpacker(getattr(layer.experts, projection))
            for expert in experts:
                unpack(expert)


def profile(cell: Cell) -> None:
    """Print the operators of two steps of ours by their own time."""
    inputs = batch(cell.shape, cell.device)
    model = variant(cell.build(cell.base == "nf4"), OURS, cell.checkpointing)
    step(model, inputs)
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            step(model, inputs)
    print(f"\n{cell}")
    by = f"self_{cell.device}_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40))


if __name__ == "__main__":
    main()
