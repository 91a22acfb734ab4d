"""A router computes with the adapted weight, and has its own again afterwards."""

import sys
import threading

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from tests import models
from tests.experts.test_expert_lora import logits
from tests.quantization.families import llama4


@pytest.fixture
def tuned():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).eval()
    models.randomize_adapter(model)
    return model


def test_threads_do_not_find_each_others_router_weights(tuned):
    wanted, weights = logits(tuned), {name: p.clone() for name, p in tuned.named_parameters()}
    wrong = []

    def run() -> None:
        wrong.extend(number for number in range(20) if not torch.equal(logits(tuned), wanted))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert all(torch.equal(p, weights[name]) for name, p in tuned.named_parameters())


def test_the_weight_is_that_of_the_base_again_after_an_error(tuned):
    router = tuned.base_model.model.model.layers[0].mlp.gate
    weight = router.get_base_layer().weight
    with pytest.raises(RuntimeError):
        router(torch.zeros(3, models.HIDDEN_SIZE + 1))
    assert router.get_base_layer().weight is weight


@pytest.mark.parametrize("offload_experts", [False, True])
def test_a_packed_stack_is_unpacked_to_the_dtype_of_the_inputs(offload_experts):
    """Whatever dtype 4-bit weights are computed in: here float32, by default."""
    base = quantize_experts_(llama4().bfloat16(), MoeBitsAndBytesConfig(offload_experts=offload_experts))
    plain = logits(base)
    tuned = get_peft_model(base, OrdMoEConfig(r=4, targets=["experts"])).eval()
    assert torch.equal(logits(tuned), plain)
    models.randomize_adapter(tuned)
    adapted = logits(tuned)
    assert adapted.dtype == torch.bfloat16
    assert not torch.equal(adapted, plain)
