"""The table of families, as Markdown, from the results of a run: `pytest tests/families --table docs/FAMILIES.md`."""

import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from tests.families.rows import NO_FAMILY, ROWS, Row, installed_rows
from tests.families.tiny import AUDIO_TOKEN, IMAGE_TOKEN


ASPECTS = {"tiers": "tiers", "lora": "LoRA", "4 bits": "4 bits"}
PARTS = {"router": "LoRA on routers", "experts": "LoRA on experts", "merging": "merging"}
# What a router's source says of how it scores and chooses.
TRAITS = {
    "softmax": r"softmax",
    "sigmoid": r"sigmoid",
    "softplus": r"softplus",
    "bias": r"correction_bias|expert_bias|e_score",
    "groups": r"topk_group",
    "capacity": r"capacity",
    "hash": r"Hash",
    "no renormalising": r"if self.norm_topk_prob",
}
HEADER = """# Mixture-of-Experts families of transformers

Made by `pytest tests/families --table docs/FAMILIES.md`, which builds a tiny random model of each class and checks what
the table says: tiers are the router's own ranks, tier 1 is the model to the bit, LoRA is PEFT's, experts pack to 4 bits
and back, PEFT without this package reads an export of the roles in the last column. `tests/families/rows.py` has a row
for each; a class that transformers adds fails the tests until it has one.
`ordmoe families MODEL` says the same of a model of your own, from its `config.json`.

## How models are read

MoE layers are found by what modules hold, and each router is judged by a trial run: it, or its block, has to choose K
of E scores by one `torch.topk`, or by rounds that each take the largest (PhiMoE, Switch). Ranks, LoRA and gradients
are tested against each family's own code. What differs:

- Models with code of their own (`trust_remote_code`) work by the same rules. Experts in an `nn.ModuleList` get PEFT's
  linear LoRA. On stacks outside transformers' experts interface, LoRA makes the whole adapted stack in each forward,
  as PEFT does, and autograd keeps it unless gradient checkpointing is on; a warning says so once.
- Where a router returns its scores alone (DBRX, many remote models), or other things than logits, weights and indices
  (Llama 4, JetMoE, Switch, ZAYA), what it routes is not logged, and training needs `balance_coef=0`.
- Layers that choose experts by token (DeepSeek-V4's hash layers) route as usual on all tiers. What a router ranks
  besides its experts has ranks, too: LongCat-Flash's zero experts, ZAYA's class for skipping the layer.
- In models with images and sounds the text model is adapted and held to tiers, image tokens included. Towers and
  talkers with experts of their own (dots3, Qwen3-Omni) are left alone; give that part to `get_peft_model` and
  `tier_routing` to have it on tiers of its own.
- Encoder-decoders (Switch), DiffusionGemma and Llama 4 take tiers and adapters; `OrdMoETrainer` does not train them,
  and says why.
- Not seen: rows whose tokens a block sorts or transposes before its router, and masks on experts that exist at run
  time only.

## The table
"""


def expert_names(model: nn.Module) -> list[str]:
    """Names of the modules of routed experts, by their classes' names; of JetMoE, of what holds a pair of them."""
    names = [
        name.rpartition(".")[0] if type(module).__name__ == "JetMoeParallelExperts" else name
        for name, module in model.named_modules()
        if re.search(r"Experts$", type(module).__name__)
        and (not re.search(r"SharedExperts$", type(module).__name__) or hasattr(module, "num_experts"))
    ]
    return list(dict.fromkeys(names))


def facts(model: nn.Module) -> dict[str, str]:
    """What the first block of experts of a model looks like, for the table."""
    names = expert_names(model)
    if not names:
        return {"router": "in the block", "layout": "of its own"}
    block = model.get_submodule(names[0].rpartition(".")[0])
    experts = model.get_submodule(names[0])
    routers = [child for child in block.children() if re.search(r"[Rr]outer|Gat(e|ing)$", type(child).__name__)]
    return {"router": _router(routers[0] if routers else None), "layout": _layout(experts)}


def _router(router: nn.Module | None) -> str:
    if router is None:
        return "in the block"
    source = inspect.getsource(type(router))
    traits = [trait for trait, pattern in TRAITS.items() if re.search(pattern, source)]
    if "no renormalising" in traits and getattr(router, "norm_topk_prob", True):
        traits.remove("no renormalising")
    if "groups" in traits and (not getattr(router, "num_group", 0) or router.num_group == 1 or _is_greedy(router)):
        traits.remove("groups")
    return ", ".join(traits) or "top-k of logits"


def _is_greedy(router: nn.Module) -> bool:
    return getattr(router, "topk_method", "") == "greedy"


def _layout(experts: nn.Module) -> str:
    if any(isinstance(module, nn.Linear) for module in experts.modules()):
        return "modules"
    stacks = [
        name.removesuffix("_proj") for name, weight in experts.named_parameters(recurse=False) if weight.dim() > 2
    ]
    flags = [word for word, flag in (("transposed", "is_transposed"), ("biased", "has_bias")) if _is(experts, flag)]
    return ", ".join(["+".join(name for name in stacks if "bias" not in name) or "flat", *flags])


def _is(experts: nn.Module, flag: str) -> bool:
    return getattr(experts, flag, False) is True


def inputs(row: Row) -> str:
    tokens = row.media.get("tokens", [])
    kinds = {"image": IMAGE_TOKEN in tokens, "sound": AUDIO_TOKEN in tokens}
    return ", ".join(
        ["embeddings" if "inputs_embeds" in row.media else "text", *(k for k, is_in in kinds.items() if is_in)]
    )


def fixed_cells(row: Row) -> str:
    """The part of a row's line that does not depend on a run."""
    notes = ", ".join([row.variant] * bool(row.variant) + [f"from {row.since}"] * bool(row.since))
    name = f"{row.name} ({notes})" if notes else row.name
    works = ["refused" if aspect in row.refused else "yes" for aspect in ASPECTS]
    if len(row.targets) == 1:
        works[1] = f"{row.targets[0]} alone"
    status = "works" if row.works else "refused" if {*works} == {"refused"} else "in part"
    return f"| {name} | {' | '.join(works)} | {inputs(row)} | {status} |"


class Results:
    """The pytest plugin that collects what tests found, and writes the table in the end."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, Any]] = defaultdict(dict)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if "row" in properties:
            self.found[properties.pop("row")].update(properties)
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter):
        missing = [row.id for row in ROWS if not row.is_installed or row.id not in self.found]
        if self.failed or missing:
            terminalreporter.write_line(f"{self.path} is not written: {self.failed or missing} failed or did not run")
        else:
            self.path.write_text(self.markdown())

    def markdown(self) -> str:
        rows = installed_rows()
        classes, folders = {row.name for row in rows}, {row.folder for row in rows}
        num_works = sum(row.works for row in rows)
        summary = (
            f"transformers {transformers.__version__}: {len(rows)} models of {len(classes)} classes in {len(folders)} "
            f"folders; {num_works} work, {len(rows) - num_works} are refused in part or whole."
        )
        lines = [
            *(HEADER, summary, ""),
            "| class | tiers | LoRA | 4 bits | inputs | status | router | experts | plain PEFT |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(self._line(row) for row in rows),
            *("", "What is refused says so by name:", ""),
            *(line for row in rows for line in self._refusals(row)),
            *("", "What does not hold for reasons upstream, each an expected failure of the tests:", ""),
            *(f"- {row.name}: `{test}`: {why}" for row in rows for test, why in row.upstream.items()),
            *("", "What the scan of transformers finds and is no family:", ""),
            *(f"- {name}: {why}" for name, why in NO_FAMILY.items()),
        ]
        return "\n".join(lines) + "\n"

    def _line(self, row: Row) -> str:
        found = self.found[row.id]
        return f"{fixed_cells(row)} {found['router']} | {found['layout']} | {found.get('plain PEFT', '')} |"

    def _refusals(self, row: Row) -> list[str]:
        """A line for each message, with the aspects that it refuses."""
        by_message: dict[str, list[str]] = defaultdict(list)
        for aspect, title in (ASPECTS | PARTS).items():
            if aspect in row.refused:
                by_message[self.found[row.id][f"refused: {aspect}"]].append(title)
        name = f"{row.name} ({row.variant})" if row.variant else row.name
        for role in row.no_export:
            by_message[self.found[row.id][f"refused: plain PEFT of {role}"]].append(
                f"an export of {role} to plain PEFT"
            )
        return [f"- {name}, {' and '.join(titles)}: {message}" for message, titles in by_message.items()]
