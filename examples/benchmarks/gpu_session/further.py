"""Section g: fp16 with a gradient scaler, the speed of generation, and the tests that want a GPU."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from ordmoe_peft import tier_routing

from ..measuring import by_turns
from .models import packed_model, random_batch
from .rows import MEASURED, Row, Size, last_line, tried, verdict
from .training import train_in_fp16


TESTS = Path(__file__).parents[3] / "tests"


def run(size: Size, device: str) -> Iterator[Row]:
    yield tried("fp16 with a gradient scaler", partial(train_in_fp16, size, device))
    yield from generate(size, device)
    yield run_tests(device)


def generate(size: Size, device: str) -> Iterator[Row]:
    """Tokens a second of one prompt, in NF4."""
    model = packed_model(size, device).eval()
    prompt = random_batch(size, device)["input_ids"][:1, :32]
    arguments = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens, "do_sample": False}
    contexts: dict[str, Callable[[], AbstractContextManager]] = {
        "without the adapter": model.disable_adapter,
        "with the adapter": nullcontext,
        "held to tier 1": partial(tier_routing, model, 1),
        "held to tier 2": partial(tier_routing, model, 2),
    }

    def generated(context: Callable[[], AbstractContextManager]) -> torch.Tensor:
        with context():
            return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments)

    runs = {name: partial(generated, context) for name, context in contexts.items()}
    times = by_turns(runs, size.repetitions, device)
    is_right = torch.equal(generated(nullcontext), generated(contexts["held to tier 1"]))
    layers = len(model.get_base_model().model.layers)
    for name, of in times.items():
        speed, ratio = size.new_tokens / of.median, of.over(times["without the adapter"])
        figure = f"{speed:.1f} tokens/s ({layers} layers), {ratio:.2f} times as long as without the adapter"
        result = verdict(is_right, "other tokens than the model") if name == "held to tier 1" else MEASURED
        yield Row(f"generation {name}", figure, result, {"tokens_per_second": speed, "ratio": ratio})


def run_tests(device: str) -> Row:
    """Those marked `gpu`, where the tests are at hand."""
    case = "pytest -m gpu"
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if device == "cpu" or not files or find_spec("pytest") is None:
        lacking = "no CUDA device" if device == "cpu" else "no tests" if not files else "no pytest"
        return Row(case, "", f"not available: {lacking}")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return Row(case, last_line(done.stdout), verdict(done.returncode == 0, "see its output"))
