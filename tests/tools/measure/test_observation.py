"""Routing scores and experts' inputs against one sample at a time, read off the routers themselves."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.data.samples import scoring_inputs
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tools.measure.observation import observe_tier, spread
from tests import models, reference, text


TOKENIZER = text.tokenizer()
DATASET = text.conversations(5)


def adapted(model):
    model = get_peft_model(model, OrdMoEConfig(r=6, lora_alpha=4)).eval()
    models.randomize_adapter(model)
    return model


BUILDERS = {
    "qwen3_moe": models.qwen3_moe,
    "gpt_oss": models.gpt_oss,
    "with LoRA": lambda: adapted(models.qwen3_moe()),
}


def slow_routing_scores(model, sample, tier: int) -> list[float]:
    """One sample alone: per layer, the mean log-probability of the ranks of `tier` over its response."""
    prompt = TOKENIZER.apply_chat_template(sample["prompt"], add_generation_prompt=True, tokenize=False)
    full = TOKENIZER.apply_chat_template(sample["prompt"] + sample["completion"], tokenize=False)
    ids, start = TOKENIZER(full, return_tensors="pt").input_ids, len(TOKENIZER(prompt).input_ids)
    seen, layers = [], MoEModel.of(model).layers
    handles = [layer.router.register_forward_hook(lambda *call: seen.append(call[2][0])) for layer in layers]
    with torch.no_grad(), tier_routing(model, tier):
        model(ids)
    for handle in handles:
        handle.remove()
    scores = []
    for logits_TE in seen:
        response_TE = logits_TE[start - 1 : -1]
        chosen = reference.experts_at_ranks(response_TE, reference.tier_ranks(tier, 3, 8, 2, "uniform"))
        tokens = zip(response_TE, chosen, strict=True)
        scores.append(
            torch.stack([row.softmax(0)[expert].log() for row, experts in tokens for expert in experts]).mean()
        )
    return [score.item() for score in scores]


@pytest.mark.parametrize("tier", [1, 3])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_routing_scores_are_those_of_each_sample_alone(build, tier):
    model = build()
    got = observe_tier(model, TOKENIZER, DATASET, tier, batch_size=3).routing_scores_nL
    wanted = torch.tensor([slow_routing_scores(model, sample, tier) for sample in DATASET])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_kept_tokens_are_spread_over_the_data_and_never_padding():
    """Batches of 3 and 2 samples give ⌈5/2⌉ = 3 tokens each, of which the first 5 stay."""
    model, embedded = models.qwen3_moe(), []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    masks = model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["attention_mask"]), with_kwargs=True
    )
    observation = observe_tier(model, TOKENIZER, DATASET, 2, batch_size=3, num_tokens=5)
    handle.remove(), masks.remove()
    assert [len(tokens.hidden_states_NH) for tokens in observation.expert_tokens] == [5] * models.NUM_LAYERS
    first_batch = embedded[1][embedded[0].bool()]
    places = torch.arange(3) * len(first_batch) // 3
    torch.testing.assert_close(observation.expert_tokens[0].hidden_states_NH[:3], first_batch[places])
    assert observation.expert_tokens[0].top_k_index_NK.shape == (5, models.TOP_K)


def test_token_scope_keeps_the_prompt_and_its_tokens_out():
    """With `response`, layer 0 routes prompts as ever; only what predicts the response is on tier 3, and kept."""
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, token_scope="response")).eval()
    sample = DATASET.select([0])
    (top, bottom), seen = [observe_tier(model, TOKENIZER, sample, tier) for tier in (1, 3)], []
    router = MoEModel.of(model).layers[0].router
    handle = router.register_forward_hook(lambda *call: seen.append(call[2][2]))
    observe_tier(model, TOKENIZER, sample, 1)
    observe_tier(model, TOKENIZER, sample, 3)
    handle.remove()
    is_lower_S = (seen[0] != seen[1]).any(1)
    labels_S = scoring_inputs(list(sample), TOKENIZER)["labels"][0]
    assert is_lower_S.tolist() == [*(labels_S[1:] != -100).tolist(), False]
    for layer, (upper, lower) in enumerate(zip(top.expert_tokens, bottom.expert_tokens, strict=True)):
        assert len(upper.top_k_index_NK) == len(lower.top_k_index_NK) == is_lower_S.sum(), layer
    torch.testing.assert_close(bottom.expert_tokens[0].top_k_index_NK, seen[1][is_lower_S])


def test_kept_experts_are_the_tiers():
    """Layer 0 sees the same tokens under all tiers, whose experts are disjoint."""
    model = models.qwen3_moe()
    kept = [observe_tier(model, TOKENIZER, DATASET, tier, num_tokens=8).expert_tokens[0] for tier in (1, 3)]
    torch.testing.assert_close(kept[0].hidden_states_NH, kept[1].hidden_states_NH)
    for top, bottom in zip(kept[0].top_k_index_NK.tolist(), kept[1].top_k_index_NK.tolist(), strict=True):
        assert not set(top) & set(bottom)


def test_the_model_is_left_as_it_was():
    model = models.qwen3_moe().train()
    hooks = [len(layer.experts._forward_pre_hooks) for layer in MoEModel.of(model).layers]
    observe_tier(model, TOKENIZER, DATASET, 2)
    assert model.training
    assert [len(layer.experts._forward_pre_hooks) for layer in MoEModel.of(model).layers] == hooks


def test_layers_that_do_not_run_are_named():
    model = models.qwen3_moe()
    # The last layer's block answers without asking its experts.
    model.model.layers[-1].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(OrdMoEModelError, match="3 routers 2 times"):
        observe_tier(model, TOKENIZER, DATASET, 1)


def test_spread():
    assert spread(torch.arange(10), 3).tolist() == [0, 3, 6]
    assert spread(torch.arange(2), 3).tolist() == [0, 1]
