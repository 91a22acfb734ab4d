"""Whole models whose experts run as on GPUs, on CPU: the same numbers as one expert at a time, wherever they run."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_, tier_routing
from ordmoe_peft.experts import forward
from ordmoe_peft.experts.tuning import ON_CPU, WorkSizes, on_gpu
from tests import models


# Three experts of models.NUM_EXPERTS at a time.
SIZES = {"few": WorkSizes(slots=1, bin_cost=2_000, row_step=8, matrices=3 * 64 * 64 * 4), "all": on_gpu()}


@pytest.fixture(params=["dense", "NF4", "NF4, in RAM"])
def tuned(request):
    model = models.qwen3_moe()
    if request.param != "dense":
        is_in_ram = request.param == "NF4, in RAM"
        quantize_experts_(model, MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True, offload_experts=is_in_ram))
    model = get_peft_model(model, OrdMoEConfig(r=4, num_tiers=2))
    models.randomize_adapter(model)
    return model


def run_with(sizes, monkeypatch):
    monkeypatch.setattr(forward, "work_sizes", lambda device: sizes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("tiers", [None, [1, 2], 2])
def test_losses_and_gradients(tuned, tiers, use_reentrant, sizes, monkeypatch):
    tuned.train()
    if use_reentrant is not None:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        tuned.enable_input_require_grads()
    batch = models.text_batch()
    tiers = tiers if not isinstance(tiers, list) else (tiers * len(batch["input_ids"]))[: len(batch["input_ids"])]

    def gradients():
        tuned.zero_grad()
        with tier_routing(tuned, tiers or 1):
            loss = tuned(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in tuned.parameters() if p.requires_grad)]

    run_with(ON_CPU, monkeypatch)
    wanted = gradients()
    assert all(gradient.any() for gradient in wanted)
    run_with(sizes, monkeypatch)
    for mine, its in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_generation(tuned, sizes, monkeypatch):
    tuned.eval()
    ids = models.text_batch()["input_ids"]
    ways = []
    for name in ("run_frozen_experts", "run_few_rows", "run_row_by_row"):
        run = getattr(forward, name)
        monkeypatch.setattr(forward, name, lambda *args, run=run, name=name: ways.append(name) or run(*args))

    def generated():
        ways.clear()
        with tier_routing(tuned, 2):
            out = tuned.generate(
                input_ids=ids, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        return torch.stack(out.scores)

    run_with(ON_CPU, monkeypatch)
    wanted = generated()
    assert "run_row_by_row" not in ways
    run_with(sizes, monkeypatch)
    torch.testing.assert_close(generated(), wanted, rtol=1e-4, atol=1e-4)
    assert "run_few_rows" not in ways
    assert ("run_row_by_row" in ways) == (sizes is SIZES["all"])
