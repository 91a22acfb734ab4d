import pytest
import torch

from ordmoe_peft import tier_routing
from ordmoe_peft.data.generation import generate_by_tier, placeholder_ids, with_responses
from ordmoe_peft.errors import OrdMoEConfigError
from tests import models


END = torch.tensor([models.EOS])
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SAMPLED = {"do_sample": True, "max_new_tokens": 6, "temperature": 2.0}


def prompts(batch_size: int = 3):
    ids = torch.arange(10, 10 + 4 * batch_size).view(batch_size, 4)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_tier(model, tiers, **options):
    return generate_by_tier(
        model, prompts(), tiers, seed=options.pop("seed", 1), end_ids=END, pad_token_id=0, **options
    )


@pytest.mark.parametrize("rows_per_call", [None, 3, 1])
def test_each_tier_writes_what_it_writes_alone(rows_per_call):
    model = models.qwen3_moe()
    responses = by_tier(model, [1, 3], rows_per_call=rows_per_call, **GREEDY)
    for place, tier in enumerate([1, 3]):
        with tier_routing(model, tier):
            alone = model.generate(**prompts(), eos_token_id=models.EOS, pad_token_id=0, **GREEDY)[:, 4:]
        written = responses.ids_CBS[place][responses.mask_CBS[place]]
        assert torch.equal(written, alone[responses.mask_CBS[place][:, : alone.shape[1]]])
    assert not torch.equal(responses.ids_CBS[0], responses.ids_CBS[1])


def test_sampling_follows_its_seed_and_leaves_the_global_state():
    model = models.qwen3_moe()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = by_tier(model, [1, 2], **SAMPLED).ids_CBS
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(by_tier(model, [1, 2], **SAMPLED).ids_CBS, first)
    assert not torch.equal(by_tier(model, [1, 2], seed=2, **SAMPLED).ids_CBS, first)


def test_responses_end_with_their_first_end_token():
    """Half of the vocabulary ends a response, so most end early; nothing after an end counts."""
    model = models.qwen3_moe()
    ends = torch.arange(0, models.VOCAB_SIZE, 2)
    responses = generate_by_tier(model, prompts(), [1, 2], seed=0, end_ids=ends, pad_token_id=1, **SAMPLED)
    for ids, mask in zip(responses.ids_CBS.flatten(0, 1), responses.mask_CBS.flatten(0, 1), strict=True):
        length = int(mask.sum())
        assert length >= 1 and mask[:length].all()
        assert not torch.isin(ids[: length - 1], ends).any()
        assert torch.isin(ids[length - 1], ends) or length == len(ids)
        assert (ids[length:] == 1).all()


def test_the_model_is_left_in_its_mode():
    model = models.qwen3_moe().train()
    by_tier(model, [1], **GREEDY)
    assert model.training


def test_several_responses_to_a_prompt_are_refused():
    with pytest.raises(OrdMoEConfigError, match="num_return_sequences=2: each tier writes one"):
        by_tier(models.qwen3_moe(), [1], num_return_sequences=2, **SAMPLED)


def test_responses_follow_their_prompts():
    """Where they were written, after the left-padded prompts; what follows a response is padding."""
    prompts = {
        "input_ids": torch.tensor([[0, 1, 2], [1, 2, 3]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 9, 8], [9, 8, 7]]),
        "pixel_values": torch.arange(6.0).view(3, 2),
    }
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rows = with_responses(prompts, torch.tensor([[11, 12, 13], [14, 0, 0]]), mask)
    assert rows["input_ids"].tolist() == [[0, 1, 2, 11, 12, 13], [1, 2, 3, 14, 0, 0]]
    assert rows["labels"].tolist() == [[-100] * 3 + [11, 12, 13], [-100] * 3 + [14, -100, -100]]
    assert rows["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert rows["token_type_ids"].tolist() == [[0, 9, 8, 0, 0, 0], [9, 8, 7, 0, 0, 0]]
    assert torch.equal(rows["pixel_values"], prompts["pixel_values"])


def test_tokens_that_stand_for_images_are_not_written():
    """A head that likes nothing better than image tokens: without suppression each response would be of them."""
    model = models.qwen3_vl_moe()
    with torch.no_grad():
        model.lm_head.weight[models.IMAGE_TOKEN] = 100 * model.lm_head.weight.abs().sum(0)
        hidden = model.model.language_model.norm
        hidden.weight.copy_(hidden.weight.abs())
    placeholders = torch.tensor(placeholder_ids(model))
    assert {models.IMAGE_TOKEN, models.VIDEO_TOKEN, models.VISION_START, models.VISION_END} == set(
        placeholders.tolist()
    )
    for extra in ({}, {"suppress_tokens": [7]}):
        responses = by_tier(model, [1, 3], **SAMPLED, **extra)
        written = responses.ids_CBS[responses.mask_CBS]
        assert not torch.isin(written, placeholders).any()
    assert not (written == 7).any()
