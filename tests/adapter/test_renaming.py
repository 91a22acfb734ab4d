"""What transformers' renamings of checkpoints make of names that are the model's own already."""

import pytest

from ordmoe_peft.adapter.renaming import check_read_by_transformers, name_before, renamed, renamings_of
from ordmoe_peft.errors import OrdMoEModelError
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject


def renamings_for(name: str):
    (row,) = [row for row in installed_rows() if row.name == name]
    return renamings_of(Subject(row).model)


@pytest.mark.parametrize(
    ("family", "own", "other"),
    [
        ("LagunaForCausalLM", "mlp.shared_experts.up_proj.lora_A.weight", "mlp.shared_experts..up_proj.lora_A.weight"),
        ("MistralLarge4ForConditionalGeneration", "mlp.gate.lora_B.weight", "mlp.mlp.gate.lora_B.weight"),
        ("Inkling2ForCausalLM", "k_proj.sconv.weight_proj.lora_A", "k_proj.sconv.weight_proj.weight.lora_A"),
    ],
)
def test_a_name_before_its_renaming_becomes_it(family, own, other):
    renamings = renamings_for(family)
    prefix = "model.language_model.layers.1." if "Conditional" in family else "model.layers.1."
    own, other = prefix + own, prefix + other
    assert renamed(own, renamings)[0] == other
    before = name_before(own, renamings)
    has_one = "sconv" not in own
    assert (renamed(before, renamings)[0] == own) == has_one
    assert (before != own) == has_one


def test_what_transformers_reads_as_something_else_is_refused():
    check_read_by_transformers(["model.layers.0.mlp.gate.lora_A.weight"], models.qwen3_moe())
    (row,) = [row for row in installed_rows() if row.name == "LagunaForCausalLM"]
    with pytest.raises(
        OrdMoEModelError, match=r"would read .*shared_experts.* as .*shared_experts\.\..*from_pretrained"
    ):
        check_read_by_transformers(["model.layers.1.mlp.shared_experts.up_proj.lora_A.weight"], Subject(row).model)
