"""Packed stacks whose scales FSDP2 drops, as it gathers plain tensors of the same bytes."""

import copy

import pytest
import torch
from torch import nn

from ordmoe_peft import quantize_experts_
from ordmoe_peft.quantization.fsdp import keep_packed_when_sharded
from ordmoe_peft.quantization.storage import is_packed
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject


def lose_states(model: nn.Module) -> None:
    """Put what FSDP2 gathers in the place of each packed stack: a plain tensor of the same bytes."""
    for name, packed in [*model.named_parameters()]:
        if is_packed(packed):
            owner, _, attribute = name.rpartition(".")
            gathered = nn.Parameter(packed.data.as_subclass(torch.Tensor).clone(), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, gathered)
    assert not any(map(is_packed, model.parameters()))


def test_what_was_gathered_finds_its_scales_before_each_forward():
    model = quantize_experts_(models.qwen3_moe())
    with torch.no_grad():
        wanted = model(**models.text_batch()).logits
    keep_packed_when_sharded(model)
    model = copy.deepcopy(model)
    lose_states(model)
    with torch.no_grad():
        assert torch.equal(model(**models.text_batch()).logits, wanted)


@pytest.mark.parametrize("name", ["Dbrx", "JetMoe", "InklingForCausalLM"])
def test_experts_outside_transformers_interface_find_theirs(name):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith(name)))
    model = quantize_experts_(subject.copy())
    wanted = subject.logits(model)
    keep_packed_when_sharded(model)
    lose_states(model)
    assert torch.equal(subject.logits(model), wanted)


def test_stacks_with_lora_find_theirs_before_lora_reads_them():
    subject = Subject(next(row for row in installed_rows() if row.name.startswith("Step3p7")))
    model = subject.adapted(quantize_experts_(subject.copy()))
    wanted = subject.logits(model)
    keep_packed_when_sharded(model)
    lose_states(model)
    assert torch.equal(subject.logits(model), wanted)
