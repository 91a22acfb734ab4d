"""The table of families, as Markdown, from the results of a run."""

import re
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ordmoe_peft.moe_model import MoELayer


def expert_names(model: nn.Module) -> list[str]:
    """Names of the modules of routed experts, found by their classes' names."""
    return [
        name
        for name, module in model.named_modules()
        if re.search(r"Experts$", type(module).__name__)
        and (not re.search(r"SharedExperts$", type(module).__name__) or hasattr(module, "num_experts"))
    ]


def facts(model: nn.Module, layers: list[MoELayer]) -> dict[str, Any]:
    return {}


class Results:
    def __init__(self, path: Path):
        self.path = path
