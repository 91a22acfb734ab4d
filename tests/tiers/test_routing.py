"""Tiers against a slow reading of the routers' scores, over everything that a forward can be part of."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoEModelError, OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tiers.plan import RandomDraw
from ordmoe_peft.tiers.routing import adapter_config, install_tier_hooks
from tests import models, reference


GROUPINGS = ("uniform", "high_only", "random")


def logits(model, batch, **extra):
    with torch.no_grad():
        return model(**batch, **extra).logits


@contextmanager
def watched_routing(model):
    """What each router gave (its logits, weights and choice) and each experts module got, per layer."""
    seen, handles = [], []

    def watch(layer):
        record = {}
        seen.append(record)

        def after_router(module, args, output):
            record["logits"], record["weights"], record["index"] = output

        handles.append(layer.router.register_forward_hook(after_router))

    for layer in MoEModel.of(model).layers:
        watch(layer)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expected_weights(family, logits_TE, index_TK):
    """Each family's own rule, from its modeling file: softmax over all experts, renormalised but in OLMoE."""
    chosen = logits_TE.float().softmax(-1).gather(1, index_TK)
    return chosen if family == "olmoe" else chosen / chosen.sum(-1, keepdim=True)


@pytest.mark.parametrize("grouping", ["uniform", "high_only"])
@pytest.mark.parametrize("num_tiers", [1, 2, 3, 4])
def test_chosen_experts_are_the_ranks_of_the_method_with_the_routers_own_weights(
    family, model, batch, num_tiers, grouping
):
    for tier in range(1, num_tiers + 1):
        with watched_routing(model) as seen, tier_routing(model, tier, num_tiers=num_tiers, grouping=grouping):
            logits(model, batch)
        ranks = reference.tier_ranks(tier, num_tiers, models.NUM_EXPERTS, models.TOP_K, grouping)
        for record in seen:
            chosen = [set(experts) for experts in record["index"].tolist()]
            assert chosen == reference.experts_at_ranks(record["logits"], ranks)
            torch.testing.assert_close(
                record["weights"].float(), expected_weights(family, record["logits"], record["index"])
            )


@pytest.mark.parametrize(("num_tiers", "ranks_within_groups"), [(2, True), (3, False)])
def test_group_limited_routers_keep_their_groups_where_tiers_fit(num_tiers, ranks_within_groups):
    """Two groups of two experts are kept, enough for two tiers of two; a third takes ranks of all experts."""
    model, batch = models.deepseek_v3(), models.text_batch()
    for layer in MoEModel.of(model).layers:
        layer.router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, models.NUM_EXPERTS))
    for tier in range(1, num_tiers + 1):
        with watched_routing(model) as seen, tier_routing(model, tier, num_tiers=num_tiers):
            logits(model, batch)
        for record in seen:
            scores_TE = record["logits"].sigmoid() + torch.linspace(-0.3, 0.3, models.NUM_EXPERTS)
            for scores, logit, chosen, weights in zip(
                scores_TE.tolist(), record["logits"], record["index"], record["weights"], strict=True
            ):
                groups = sorted(range(4), key=lambda group: -sum(scores[2 * group : 2 * group + 2]))[:2]
                kept = sorted((e for g in groups for e in (2 * g, 2 * g + 1)), key=lambda e: -scores[e])
                rest = sorted(set(range(8)) - set(kept[:2]), key=lambda e: -scores[e])
                ranked = kept if ranks_within_groups else [*kept[:2], *rest]
                first = {2: (0, 2), 3: (0, 3, 6)}[num_tiers][tier - 1]
                assert set(chosen.tolist()) == set(ranked[first : first + 2])
                own = logit[chosen].sigmoid()
                torch.testing.assert_close(weights, own / own.sum() * model.config.routed_scaling_factor)


def test_tier_1_is_the_model_to_the_bit(model, batch):
    base = logits(model, batch)
    with tier_routing(model, 1):
        assert torch.equal(logits(model, batch), base)
    with tier_routing(model, 3):
        assert not torch.allclose(logits(model, batch), base, atol=1e-3)
    assert torch.equal(logits(model, batch), base), "nothing stays behind"


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_tier_per_row_is_that_tiers_own_pass(model, batch, grouping):
    rows = len(batch["input_ids"])
    tiers = [3, 1, 2][:rows]
    with tier_routing(model, tiers, grouping=grouping):
        mixed = logits(model, batch)
    for row, tier in enumerate(tiers):
        with tier_routing(model, tier, grouping=grouping):
            torch.testing.assert_close(mixed[row], logits(model, batch)[row], rtol=1e-4, atol=1e-5)


def test_layer_scope(model, batch):
    with watched_routing(model) as plain:
        logits(model, batch)
    with watched_routing(model) as seen, tier_routing(model, 2, layer_scope=[1]):
        logits(model, batch)
    assert torch.equal(seen[0]["index"], plain[0]["index"])
    assert not torch.equal(seen[1]["index"], plain[1]["index"])
    # Layer 2 is out of scope: its experts are the first K of what it now sees.
    assert torch.equal(seen[2]["index"], seen[2]["logits"].softmax(-1).topk(models.TOP_K).indices)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_of_no_checkpointing(family, batch, grouping, use_reentrant):
    def gradients(checkpointing: bool):
        model = get_peft_model(models.FAMILIES[family](), OrdMoEConfig(r=4, targets=["router", "experts", "attention"]))
        models.randomize_adapter(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        rows = len(batch["input_ids"])
        with tier_routing(model, [3, 2, 1][:rows], grouping=grouping):
            mixed = model(**batch, use_cache=False).logits
        plain = model(**batch, use_cache=False).logits
        # Both backward passes run after the block is left, the later forward's first.
        (plain.square().mean() + mixed.pow(3).mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    wanted, got = gradients(False), gradients(True)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def recomputed(model, batch, tokens, tier, **settings):
    """Greedy next tokens by running the whole sequence again for each."""
    sequence, rest = batch["input_ids"], {k: v for k, v in batch.items() if k != "input_ids"}
    mask = rest.pop("attention_mask")
    types = rest.pop("mm_token_type_ids", None)
    for _ in range(tokens):
        extra = {} if types is None else {"mm_token_type_ids": types}
        position_ids = {} if types is not None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with tier_routing(model, tier, **settings):
            step = logits(
                model,
                {"input_ids": sequence, "attention_mask": mask, **rest, **extra, **position_ids},
                use_cache=False,
            )
        sequence = torch.cat([sequence, step[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        types = None if types is None else torch.cat([types, types.new_zeros(len(types), 1)], dim=1)
    return sequence


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("tier", [1, 3, "mixed"])
def test_cached_generation_is_full_recomputation(model, batch, tier, grouping):
    """Left-padded rows, image tokens, prefill and every cached step."""
    rows = len(batch["input_ids"])
    tier = [2, 1, 3][:rows] if tier == "mixed" else tier
    with tier_routing(model, tier, grouping=grouping):
        generated = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(generated, recomputed(model, batch, 5, tier, grouping=grouping))


def test_left_padding_does_not_change_a_rows_tokens():
    model = models.qwen3_moe()
    tokens = models.text_batch(rows=1, padding=0)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens["attention_mask"]], dim=1),
    }
    position_ids = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tier_routing(model, 3):
        alone, with_padding = logits(model, tokens), logits(model, padded, position_ids=position_ids)
    torch.testing.assert_close(with_padding[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_several_sequences_per_prompt_and_beams_keep_their_rows_tier():
    model = models.qwen3_moe()
    batch = models.text_batch(rows=2, padding=0)
    with tier_routing(model, [1, 3]):
        beams = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, num_beams=2, num_return_sequences=2)
    for row, tier in enumerate((1, 3)):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        with tier_routing(model, tier):
            wanted = model.generate(**alone, max_new_tokens=3, min_new_tokens=3, num_beams=2, num_return_sequences=2)
        assert torch.equal(beams[2 * row : 2 * row + 2], wanted)


class TestBlocks:
    def test_nest_and_end_with_errors(self, batch, model):
        base = logits(model, batch)
        with tier_routing(model, 3):
            third = logits(model, batch)
            with pytest.raises(ZeroDivisionError), tier_routing(model, 2):
                assert not torch.equal(logits(model, batch), third)
                raise ZeroDivisionError
            assert torch.equal(logits(model, batch), third)
            with tier_routing(model, 1):
                assert torch.equal(logits(model, batch), base)
        assert torch.equal(logits(model, batch), base)

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_an_error_inside_a_forward_leaves_nothing_behind(self, model, batch, error):
        def fail(*_):
            raise error

        base = logits(model, batch)
        experts = MoEModel.of(model).layers[1].experts
        handle = experts.register_forward_pre_hook(fail)
        with pytest.raises(error), tier_routing(model, 3):
            logits(model, batch)
        handle.remove()
        assert torch.equal(logits(model, batch), base)

    def test_other_threads_and_models_are_not_affected(self):
        model, batch = models.qwen3_moe(), models.text_batch()
        other = copy.deepcopy(model)
        base, result = logits(model, batch), {}
        with tier_routing(model, 3):
            thread = threading.Thread(target=lambda: result.update(thread=logits(model, batch)))
            thread.start()
            thread.join()
            assert torch.equal(logits(other, batch), base)
            assert not torch.equal(logits(model, batch), base)
        assert torch.equal(result["thread"], base)

    def test_two_threads_hold_different_tiers(self):
        model, batch = models.qwen3_moe(), models.text_batch()
        with tier_routing(model, 2):
            second = logits(model, batch)
        with tier_routing(model, 3):
            third = logits(model, batch)
        got, barrier = {}, threading.Barrier(2)

        def run(tier):
            with tier_routing(model, tier):
                barrier.wait()
                got[tier] = [logits(model, batch) for _ in range(5)]

        threads = [threading.Thread(target=run, args=(tier,)) for tier in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for tier, wanted in ((2, second), (3, third)):
            for value in got[tier]:
                torch.testing.assert_close(value, wanted)

    def test_a_copied_model_routes_like_its_original(self, model, batch):
        with tier_routing(model, 2):
            wanted = logits(model, batch)
        copied = copy.deepcopy(model)
        with tier_routing(copied, 2):
            assert torch.equal(logits(copied, batch), wanted)


def test_fields_of_the_draw_by_their_old_names(model, batch):
    with tier_routing(model, 2, grouping="random", draw=RandomDraw(step=3, num_samples=1)):
        wanted = logits(model, batch)
    with pytest.warns(FutureWarning, match="fields of its `draw`"):
        block = tier_routing(model, 2, grouping="random", step=3, num_samples=1)
        with block:
            assert torch.equal(logits(model, batch), wanted)
    with pytest.raises(TypeError, match="stage"), tier_routing(model, 2, stage=1):
        pass


class TestAdapters:
    def test_settings_come_from_the_active_adapter(self, model, batch):
        with tier_routing(model, 2, num_tiers=4, grouping="high_only", layer_scope=[0]):
            wanted = logits(model, batch)
        tuned = get_peft_model(
            model, OrdMoEConfig(r=4, num_tiers=4, grouping="high_only", layer_scope=[0], targets=["experts"])
        )
        with tier_routing(tuned, 2):
            torch.testing.assert_close(logits(tuned, batch), wanted, rtol=1e-4, atol=1e-5)

    def test_tiers_hold_with_the_adapter_disabled_and_rank_by_the_adapted_router(self, model, batch):
        with tier_routing(model, 3):
            wanted = logits(model, batch)
        tuned = get_peft_model(model, OrdMoEConfig(r=4))
        models.randomize_adapter(tuned)
        with watched_routing(tuned) as seen, tier_routing(tuned, 3):
            assert not torch.allclose(logits(tuned, batch), wanted, atol=1e-3)
        ranks = reference.tier_ranks(3, 3, models.NUM_EXPERTS, models.TOP_K, "uniform")
        for record in seen:
            chosen = [set(experts) for experts in record["index"].tolist()]
            assert chosen == reference.experts_at_ranks(record["logits"], ranks)
        with tier_routing(tuned, 3), tuned.disable_adapter():
            assert torch.equal(logits(tuned, batch), wanted)

    def test_parts_of_an_adapted_model_take_the_active_adapters_settings(self, batch):
        tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, num_tiers=4))
        tuned.add_adapter("second", OrdMoEConfig(r=4, num_tiers=2))
        base = tuned.get_base_model()
        parts = (tuned, tuned.base_model, base, base.model)
        assert [adapter_config(part).num_tiers for part in parts] == [4] * 4
        tuned.set_adapter("second")
        assert [adapter_config(part).num_tiers for part in parts] == [2] * 4
        assert adapter_config(copy.deepcopy(tuned).get_base_model().model).num_tiers == 2
        assert adapter_config(tuned.unload()).num_tiers == adapter_config(base.model).num_tiers == 3

    def test_tiers_that_the_caller_changes_afterwards_are_those_that_were_asked_for(self, model, batch):
        rows = len(batch["input_ids"])
        tiers = torch.full((rows,), 2)
        with tier_routing(model, tiers):
            wanted = logits(model, batch)
            tiers.fill_(3)
            assert torch.equal(logits(model, batch), wanted)


class TestRouters:
    def test_one_that_does_not_call_topk_is_refused_by_name(self):
        model = models.qwen3_moe()
        router = model.model.layers[1].mlp.gate
        router.forward = lambda hidden_states: (hidden_states @ router.weight.T).sort(dim=-1)
        with pytest.raises(OrdMoEModelError, match=r"model\.layers\.1\.mlp\.gate .*0 calls of torch\.topk"):
            get_peft_model(model, OrdMoEConfig())

    @pytest.mark.parametrize("tier_weights", ["router", "match"])
    def test_a_layer_without_one_is_refused_by_name(self, tier_weights):
        model = models.qwen3_moe()
        model.model.layers[2].mlp.gate = torch.nn.Identity()
        with pytest.raises(OrdMoEModelError, match=r"model\.layers\.2\.mlp has experts but no router"):
            get_peft_model(model, OrdMoEConfig(targets=["experts"], tier_weights=tier_weights))

    def test_a_dense_model_is_refused(self):
        with pytest.raises(OrdMoEModelError, match="Qwen3ForCausalLM has no MoE layers"):
            get_peft_model(models.qwen3_dense(), OrdMoEConfig())


def test_compiled_model_is_not_wrong():
    """Hooks and the selection mode may break the graph, but the tiers must hold."""
    model, batch = models.qwen3_moe(), models.text_batch(padding=0)
    with tier_routing(model, 3):
        wanted = logits(model, batch)
    plain = logits(model, batch)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, batch), plain)
    with tier_routing(model, 3):
        torch.testing.assert_close(logits(compiled, batch), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(compiled, batch), plain)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_matched_weights_sum_to_what_tier_1s_would(family, model, batch, grouping):
    """In the first layer both tiers see the same tokens, so the sums can be compared; tier 1 is not touched."""
    install_tier_hooks(model)  # first, so that what is watched is what the experts get
    settings = {"grouping": grouping, "draw": RandomDraw(num_samples=1)}
    with watched_routing(model) as plain:
        untouched = logits(model, batch)
    own_sum = plain[0]["weights"].sum(-1)
    for tier in (2, 3):
        with watched_routing(model) as router, tier_routing(model, tier, **settings):
            logits(model, batch)
        with watched_routing(model) as matched, tier_routing(model, tier, tier_weights="match", **settings):
            logits(model, batch)
        assert torch.equal(matched[0]["index"], router[0]["index"])
        torch.testing.assert_close(matched[0]["weights"].sum(-1), own_sum)
        proportions = router[0]["weights"] / router[0]["weights"].sum(-1, keepdim=True)
        torch.testing.assert_close(matched[0]["weights"], proportions * own_sum[:, None])
        if family == "olmoe":
            assert (router[0]["weights"].sum(-1) < 0.9 * own_sum).all()
    with tier_routing(model, 1, tier_weights="match"):
        assert torch.equal(logits(model, batch), untouched)


def test_matched_weights_have_a_gradient_through_both_choices():
    """Against the same output put together by hand from the router's softmax."""
    model = models.olmoe()
    layer = MoEModel.of(model).layers[0]
    weight = layer.router.weight
    hidden = torch.randn(5, models.HIDDEN_SIZE)
    probabilities = (hidden @ weight.T).softmax(-1)
    ranked = probabilities.argsort(-1, descending=True)
    own, low = (probabilities.gather(1, ranked[:, span]) for span in (slice(0, 2), slice(6, 8)))
    wanted = torch.autograd.grad((low * own.sum(-1, keepdim=True) / low.sum(-1, keepdim=True)).square().sum(), weight)
    gradient = []

    def stop(module, args, output):
        gradient.extend(torch.autograd.grad(output[1].square().sum(), weight))

    install_tier_hooks(model)
    layer.router.register_forward_hook(stop)
    layer.router.register_forward_pre_hook(lambda module, args: (hidden,), prepend=True)
    for other in MoEModel.of(model).layers[1:]:
        other.router.register_forward_pre_hook(lambda module, args: None)
    with tier_routing(model, 3, tier_weights="match", layer_scope=[0]):
        model(torch.arange(5)[None])
    torch.testing.assert_close(gradient[0], wanted[0], rtol=1e-4, atol=1e-7)


def test_an_interrupted_forward_leaves_nothing_on(model):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    batch = models.text_batch()
    plain = model(**batch).logits
    with pytest.raises(Interrupted), tier_routing(model, 3):  # which always_call hooks do not see
        router = MoEModel.of(model).layers[1].router
        handle = router.register_forward_pre_hook(interrupt)
        model(**batch)
    handle.remove()
    assert torch.equal(model(**batch).logits, plain)


def test_a_layer_that_runs_by_itself_is_on_no_tier(model):
    block = MoEModel.of(model).layers[0].block
    with tier_routing(model, 2), pytest.raises(OrdMoERuntimeError, match="not within a forward of its text model"):
        block(torch.randn(1, 4, models.HIDDEN_SIZE))
    with tier_routing(model, 1):
        block(torch.randn(1, 4, models.HIDDEN_SIZE))


def test_a_router_that_returns_no_weights_is_refused_for_matching():
    class NoWeights(torch.nn.Module):
        top_k = models.TOP_K

        def __init__(self, router):
            super().__init__()
            self.weight = router.weight

        def forward(self, hidden_states):
            scores = hidden_states @ self.weight.T
            return scores, torch.topk(scores, self.top_k).indices

    model = models.qwen3_moe()
    block = model.model.layers[0].mlp
    block.gate = NoWeights(block.gate)
    with pytest.raises(OrdMoEModelError, match=r"layers\.0\.mlp\.gate.*set tier_weights='router'"):
        get_peft_model(model, OrdMoEConfig(r=4, tier_weights="match"))
    assert not hasattr(block.gate, "tier_hook_handles")
