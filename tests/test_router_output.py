from types import SimpleNamespace

import pytest
import torch

from ordmoe_peft.router_output import read_router_output


LAYER = SimpleNamespace(num_experts=8, top_k=2)
LOGITS, WEIGHTS, INDEX = torch.randn(5, 8), torch.rand(5, 2), torch.randint(8, (5, 2))


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ((LOGITS, WEIGHTS, INDEX), (LOGITS, WEIGHTS, INDEX)),
        ((LOGITS, WEIGHTS, INDEX, torch.rand(5, 3)), (LOGITS, WEIGHTS, INDEX)),
        (LOGITS, (LOGITS, None, None)),
        ((LOGITS, INDEX), (LOGITS, None, INDEX)),
        ((torch.rand(5, 7), WEIGHTS, INDEX), (None, WEIGHTS, INDEX)),
        ((LOGITS, WEIGHTS, INDEX, INDEX), (LOGITS, WEIGHTS, None)),
        ((LOGITS, torch.rand(5, 3), torch.ones(5, 2, dtype=torch.bool)), (LOGITS, None, None)),
        (None, (None, None, None)),
    ],
    ids=["usual", "one more", "logits alone", "no weights", "other logits", "two choices", "a mask", "nothing"],
)
def test_parts_are_told_apart_by_width_and_kind(output, found):
    for part, wanted in zip(read_router_output(LAYER, output), found, strict=True):
        assert part is wanted
