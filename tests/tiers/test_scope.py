import pytest
import torch

from ordmoe_peft import tier_routing
from ordmoe_peft.tiers.scope import tiers_of_labels, tiers_of_prompts
from tests import models


FAMILIES = [models.qwen3_moe, models.olmoe, models.gpt_oss]


def test_positions_that_predict_the_response_follow_the_tier():
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 5, 6, 9, 9], [-100] * 5])
    tiers = tiers_of_labels(torch.tensor([3, 2, 3]), labels, "response")
    assert tiers.tolist() == [[1, 3, 3, 1, 1], [2, 2, 2, 2, 1], [1, 1, 1, 1, 1]]
    assert tiers_of_labels(torch.tensor([3, 2, 3]), labels, "sequence").tolist() == [3, 2, 3]


def test_of_a_prompt_only_the_last_position_does():
    assert tiers_of_prompts(torch.tensor([2, 3]), 3, "response").tolist() == [[1, 1, 2], [1, 1, 3]]
    assert tiers_of_prompts(torch.tensor([2, 3]), 3, "sequence").tolist() == [2, 3]


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_a_response_in_scope_is_what_a_cached_prompt_gives(build):
    """The prompt but its last token runs untouched into a cache; then the rest runs wholly under the tier."""
    model = build()
    ids = torch.arange(10, 26).view(2, 8)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        with tier_routing(model, tiers_of_labels(torch.tensor([3, 2]), labels, "response")):
            together = model(ids).logits[:, 4:7]
        for row, tier in enumerate([3, 2]):
            cache = model(ids[row : row + 1, :4], use_cache=True).past_key_values
            with tier_routing(model, tier):
                alone = model(ids[row : row + 1, 4:7], past_key_values=cache).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together, model(ids).logits[:, 4:7], atol=1e-3)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on_under_the_last_columns_tier(build, beams):
    """Greedy decoding without a cache, one token at a time, is the same choice step by step."""
    model = build()
    prompts = torch.arange(10, 18).view(2, 4)
    tiers = torch.tensor([3, 1])
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": 95}
    with tier_routing(model, tiers_of_prompts(tiers, 4, "response")):
        cached = model.generate(prompts, **settings)
        uncached = model.generate(prompts, use_cache=False, **settings)
    assert torch.equal(cached, uncached)
    if beams == 1:
        ids = prompts
        for _ in range(4):
            labels = torch.where(torch.arange(ids.shape[1] + 1) >= 4, 1, -100).expand(2, -1)
            with torch.no_grad(), tier_routing(model, tiers_of_labels(tiers, labels, "response")[:, :-1]):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(cached, ids)
