"""Probes: sequences that an adapter is known by."""

import copy

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.adapter.probes import make_probes, replay
from tests import models


@pytest.fixture(scope="module")
def tuned():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    models.randomize_adapter(model)
    return model


def test_log_probabilities_are_those_of_each_tier(tuned):
    probes = make_probes(tuned, "default")
    ids = torch.tensor(probes["token_ids"])
    assert ids.shape == (4, 12)
    tuned.eval()
    for tier in (1, 2, 3):
        with torch.no_grad(), tier_routing(tuned, tier):
            log_probs = tuned(input_ids=ids).logits.log_softmax(-1)
        wanted = [[float(log_probs[b, s, ids[b, s + 1]]) for s in range(11)] for b in range(4)]
        torch.testing.assert_close(
            torch.tensor(probes["log_probs"][str(tier)]), torch.tensor(wanted), atol=1e-4, rtol=0
        )
    assert len(probes["log_probs"]) == 3


def test_random_groups_are_the_same_each_time():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, grouping="random"))
    probes = make_probes(model, "default")
    assert replay(model, probes["token_ids"], 3) == probes["log_probs"]


def test_training_goes_on_as_if_they_had_not_been_made(tuned):
    model = copy.deepcopy(tuned).train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.random.get_rng_state()
    make_probes(model, "default")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(weight.grad is None for weight in model.parameters())


def test_images_are_not_among_the_tokens():
    model = get_peft_model(models.qwen3_vl_moe(), OrdMoEConfig(r=4))
    config = model.config
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    probes = make_probes(model, "default")
    assert not special & {token for row in probes["token_ids"] for token in row}


def test_none_are_made_where_they_would_be_of_something_else(tuned, caplog, monkeypatch):
    model = copy.deepcopy(tuned)
    model.add_adapter("second", OrdMoEConfig(r=4))
    assert make_probes(model, "second") is None
    assert make_probes(model, "default") is not None
    with model.disable_adapter():
        assert make_probes(model, "default") is None

    def wants_more(*args, **kwargs):
        raise ValueError("no images given")

    monkeypatch.setattr(model.base_model.model, "forward", wants_more)
    monkeypatch.setattr("ordmoe_peft.adapter.probes.logger.propagate", True, raising=False)
    with caplog.at_level("WARNING"):
        assert make_probes(model, "default") is None
    assert "no probes: the model did not run on tokens alone (no images given)" in caplog.text


def test_they_are_of_the_adapter_as_it_is_loaded(tuned):
    """An adapter in 16 bits, as on a base in 4 bits it is trained, is in float32 when it is loaded."""
    model = copy.deepcopy(tuned)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(torch.bfloat16)
    probes = make_probes(model, "default")
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert make_probes(model.float(), "default") == probes


def test_numbers_that_are_no_json_are_not_written(tuned):
    model = copy.deepcopy(tuned)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    assert make_probes(model, "default") is None
