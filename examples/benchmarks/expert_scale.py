"""How the time per token of a step grows with experts, experts per token, and tokens: a table, and a plot.

    python -m examples.benchmarks.expert_scale --plot scale.png

One layer of `--hidden` and `--width` in bfloat16. With E the frozen weights that a batch reads grow, with K its work.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ordmoe_peft.cli.tables import print_table

from .measuring import by_turns, in_own_process, print_cpu
from .subjects import DTYPES, Shape, batch, build_base, step, variant


@dataclass
class Options:
    """What to sweep; each sweep holds the others at their defaults."""

    num_experts: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256])
    top_k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    tokens: list[int] = field(default_factory=lambda: [64, 256, 1024, 4096, 16384])
    hidden: int = field(default=512, metadata={"help": "H."})
    width: int = field(default=192, metadata={"help": "F."})
    dtype: str = field(default="bfloat16", metadata={"help": f"One of {list(DTYPES)}."})
    repetitions: int = field(default=3, metadata={"help": "Timed steps of each."})
    plot: str | None = field(default=None, metadata={"help": "File for the plot, e.g. scale.png."})


def main() -> None:
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    print_cpu()

    def shape(experts: int = 64, top_k: int = 8, tokens: int = 1024) -> Shape:
        return Shape(experts, top_k, options.hidden, options.width, 1, tokens)

    sweeps = {
        "E": {experts: shape(experts=experts) for experts in options.num_experts},
        "K": {top_k: shape(top_k=top_k) for top_k in options.top_k},
        "T": {tokens: shape(tokens=tokens) for tokens in options.tokens},
    }
    found = {}
    for name, shapes in sweeps.items():
        found[name] = {
            value: in_own_process(time_step, shape, options.dtype, options.repetitions)
            for value, shape in shapes.items()
        }
        rows = [
            [str(value), f"{floor:.1f}", f"{ours:.1f}", f"{ours / floor:.2f}"]
            for value, (floor, ours) in found[name].items()
        ]
        print_table(f"\nµs per token of a step, {options.dtype}, by {name}", [name, "floor", "ours", "ratio"], rows)
    if options.plot is not None:
        draw(found, options.plot)


def time_step(shape: Shape, dtype: str, repetitions: int) -> tuple[float, float]:
    """Median µs per token of the floor's step and of ours."""
    base, inputs = build_base(shape, DTYPES[dtype], False, "cpu"), batch(shape, "cpu")
    models = {name: variant(base, name) for name in ("floor", "ours")}
    times = by_turns({name: lambda model=model: step(model, inputs) for name, model in models.items()}, repetitions)
    return tuple(1e6 * times[name].median / shape.tokens for name in models)


def draw(found: dict[str, dict[int, tuple[float, float]]], path: str) -> None:
    """Time per token over each sweep, which goes in powers of two."""
    from matplotlib.figure import Figure

    labels = {"E": "experts", "K": "experts per token", "T": "tokens"}
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, 3), found.items(), strict=True):
        for place, label in enumerate(("floor", "ours")):
            axes.plot(list(points), [times[place] for times in points.values()], marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(labels[name])
    figure.axes[0].set_ylabel("µs per token of a step")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
    print(f"Plot in {path}")


if __name__ == "__main__":
    main()
