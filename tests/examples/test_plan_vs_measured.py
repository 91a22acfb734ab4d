"""The benchmark that holds the plan against measured steps, on a model of two small layers."""

import pytest

from examples.benchmarks import plan_vs_measured
from examples.benchmarks.plan_vs_measured import BF16, CONFIGS, Case, measure
from ordmoe_peft.tools.plan.plan import plan_memory


@pytest.mark.parametrize("quantization", [None, BF16], ids=["bf16", "nf4"])
def test_a_case_is_planned_as_it_is_measured(quantization, monkeypatch):
    small = CONFIGS["qwen3_moe"] | {"num_hidden_layers": 2, "hidden_size": 256, "num_experts": 8}
    monkeypatch.setitem(plan_vs_measured.CONFIGS, "qwen3_moe", small | {"num_experts_per_tok": 2})
    case = Case("qwen3_moe", {"sequence_length": 128, "num_tiers": 2}, quantization)
    planned = plan_memory(case.config, case.plan_settings).activations.peak
    assert measure(case) == pytest.approx(planned, rel=0.1)
