"""What is counted, and what is not."""

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.monitoring.router_meter import RouterMeter
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject


def measured(model, *batches, **settings):
    with torch.no_grad(), RouterMeter(model, **settings) as meter:
        for batch in batches:
            model(**batch)
    return meter.report()


def figures(layers):
    """All figures as one list per layer, names apart."""
    rows = []
    for layer in layers:
        drift = [] if layer.drift_kl is None else [layer.drift_overlap, layer.drift_kl]
        own = [layer.imbalance, layer.variation, layer.marginal_entropy, layer.token_entropy, layer.score_std]
        rows.append([layer.num_tokens, *layer.utilisation, *own, *layer.gate_mass, *layer.tier_probability, *drift])
    return torch.tensor(rows, dtype=torch.float64)


def adapted(build=models.qwen3_moe, randomize=True, **settings):
    model = get_peft_model(build(), OrdMoEConfig(r=4, **settings)).eval()
    if randomize:
        models.randomize_adapter(model)
    return model


def test_utilisation_and_probability_are_those_of_the_routers_own_output(model, batch):
    outputs = {}
    layers = MoEModel.of(model).layers
    handles = [
        layer.router.register_forward_hook(
            lambda module, args, output, index=layer.index: outputs.update({index: output})
        )
        for layer in layers
    ]
    reports = measured(model, batch, num_tiers=3)
    for handle in handles:
        handle.remove()
    is_real = batch["attention_mask"].reshape(-1).bool()
    assert len(reports) == len(layers) == models.NUM_LAYERS
    for layer, report in zip(layers, reports, strict=True):
        logits, weights, chosen = (part[is_real] for part in outputs[layer.index])
        counts = torch.bincount(chosen.reshape(-1), minlength=models.NUM_EXPERTS)
        fair = len(chosen) * models.TOP_K / models.NUM_EXPERTS
        assert report.name == layer.block_name
        assert report.num_tokens == is_real.sum()
        assert report.utilisation == pytest.approx((counts / fair).tolist())
        assert report.gate_mass[0] == pytest.approx(weights.sum(1).mean().item(), abs=1e-6)
        # Ranks 1-2, 4-5 and 7-8 of 8: round((8 − 2) / 2) = 3 ranks apart.
        ranked = logits.softmax(1).sort(1, descending=True).values
        expected = [ranked[:, start : start + 2].sum(1).mean().item() for start in (0, 3, 6)]
        assert report.tier_probability == pytest.approx(expected, abs=1e-6)


def test_gate_mass_follows_the_routers_own_rule():
    """Mixtral and this Qwen3 renormalise the chosen weights; OLMoE's are the probabilities themselves."""
    for build in (models.qwen3_moe, models.mixtral):
        for layer in measured(build(), models.text_batch(), num_tiers=3):
            assert layer.gate_mass == pytest.approx([1, 1, 1], abs=1e-5)
            assert layer.tier_probability[2] < 0.1
    for layer in measured(models.olmoe(), models.text_batch(), num_tiers=3):
        assert layer.gate_mass == pytest.approx(layer.tier_probability, abs=1e-6)
        assert layer.gate_mass[2] < 0.1 < layer.gate_mass[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = models.qwen3_moe()
    ids = models.text_batch(rows=3, padding=0)["input_ids"]
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pads = torch.full((3, 4), models.PAD)
    parts = [pads, ids] if side == "left" else [ids, pads]
    padded = torch.cat(parts, dim=1)
    batch = {"input_ids": padded, "attention_mask": (padded != models.PAD).long()}
    torch.testing.assert_close(
        figures(measured(model, batch, num_tiers=3)), figures(measured(model, plain, num_tiers=3)), atol=1e-4, rtol=1e-4
    )


def test_batches_add_up(model, batch):
    once, twice = figures(measured(model, batch)), figures(measured(model, batch, batch))
    torch.testing.assert_close(twice[:, 0], 2 * once[:, 0])
    torch.testing.assert_close(twice[:, 1:], once[:, 1:])


@pytest.mark.parametrize("tiers", [[1, 1, 1, 2, 2, 2, 3, 3, 3], [3, 2, 1] * 3], ids=["tier-major", "mixed"])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_only_rows_on_tier_1_count(tiers, has_adapter):
    """Whether the tier hooks were on before the meter's or not."""
    model = adapted() if has_adapter else models.qwen3_moe()
    rows = models.text_batch(rows=9)
    on_top = torch.tensor(tiers) == 1
    wanted = figures(measured(model, {name: value[on_top] for name, value in rows.items()}, num_tiers=3))
    with torch.no_grad(), RouterMeter(model, num_tiers=3) as meter, tier_routing(model, tiers, num_tiers=3):
        model(**rows)
    torch.testing.assert_close(figures(meter.report()), wanted, atol=1e-5, rtol=1e-5)


def test_measuring_does_not_change_the_forward(model, batch):
    for tiers in (1, 3):
        with torch.no_grad(), tier_routing(model, tiers, num_tiers=3):
            before = model(**batch).logits
            with RouterMeter(model, num_tiers=3, grouping="random"):
                assert torch.equal(model(**batch).logits, before)
            assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
def test_recomputation_in_backward_is_not_counted(checkpointing):
    model = adapted().train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    runs = []
    MoEModel.of(model).layers[0].router.register_forward_hook(lambda *_: runs.append(1))
    batch = models.text_batch()
    with RouterMeter(model, num_tiers=3, training_only=True) as meter:
        model(**batch).logits.sum().backward()
    assert len(runs) == (1 if checkpointing is None else 2)
    got = figures(meter.report())
    assert got[:, 0].tolist() == [batch["attention_mask"].sum()] * models.NUM_LAYERS
    torch.testing.assert_close(got, figures(measured(model, batch, num_tiers=3)))


def test_training_only_leaves_out_evaluation_and_generation():
    model, batch = models.qwen3_moe(), models.text_batch()
    with RouterMeter(model, training_only=True) as meter:
        model.eval()
        model(**batch)
        with torch.no_grad():
            model.train()
            model.generate(**batch, max_new_tokens=2)
        assert meter.report() == []
        model(**batch)
    assert meter.report()[0].num_tokens == batch["attention_mask"].sum()


def test_cached_steps_count_their_own_tokens():
    model, batch = models.qwen3_moe(), models.text_batch()
    with RouterMeter(model) as meter:
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # The last new token is never fed back.
    assert meter.report()[0].num_tokens == batch["attention_mask"].sum() + 2 * len(batch["input_ids"])


def test_an_untouched_adapter_has_not_drifted():
    for layer in measured(adapted(randomize=False), models.text_batch()):
        assert layer.drift_overlap == 1
        assert layer.drift_kl == 0


def test_drift_is_that_of_the_router_on_the_adapted_models_hidden_states(batch, family):
    model = adapted(models.FAMILIES[family])
    layers = MoEModel.of(model).layers
    seen = {}
    handles = [
        layer.router.register_forward_hook(
            lambda module, args, output, index=layer.index: seen.update({index: (args, output)})
        )
        for layer in layers
    ]
    reports = measured(model, batch)
    for handle in handles:
        handle.remove()
    is_real = batch["attention_mask"].reshape(-1).bool()
    for layer, report in zip(layers, reports, strict=True):
        args, (logits, _, index) = seen[layer.index]
        with torch.no_grad():
            base_logits, _, base_index = layer.router(*args)  # outside of PEFT's wrapper: without the adapter
        base = torch.distributions.Categorical(logits=base_logits[is_real])
        kl = torch.distributions.kl_divergence(base, torch.distributions.Categorical(logits=logits[is_real]))
        pairs = zip(index[is_real].tolist(), base_index[is_real].tolist(), strict=True)
        overlap = [len(set(mine) & set(other)) / models.TOP_K for mine, other in pairs]
        assert report.drift_kl == pytest.approx(kl.mean().item(), rel=1e-3)
        assert report.drift_kl > 1e-3
        assert report.drift_overlap == pytest.approx(sum(overlap) / len(overlap))


def test_there_is_no_drift_without_an_adapter_on_the_router():
    for model in (models.qwen3_moe(), adapted(targets=["experts"])):
        assert measured(model, models.text_batch())[0].drift_kl is None
    merged = adapted()
    merged.merge_adapter()
    assert measured(merged, models.text_batch())[0].drift_kl is None


def test_sums_are_reduced_before_means_are_taken():
    """Two processes of which the other saw nothing, then one that saw the same."""
    model, batch = models.qwen3_moe(), models.text_batch()
    with torch.no_grad(), RouterMeter(model) as meter:
        model(**batch)
    alone = figures(meter.report(reduce=lambda sums: sums + torch.zeros_like(sums)))
    both = figures(meter.report(reduce=lambda sums: sums + sums))
    torch.testing.assert_close(both[:, 0], 2 * alone[:, 0])
    torch.testing.assert_close(both[:, 1:], alone[:, 1:])
    meter.reset()
    assert meter.report() == []


def test_hooks_are_gone_after_the_block_and_after_an_error():
    model, batch = models.qwen3_moe(), models.text_batch()
    meter = RouterMeter(model)
    with pytest.raises(IndexError), meter:
        model(input_ids=torch.tensor([[models.VOCAB_SIZE + 5]]))
    model(**batch)
    assert meter.report() == []


def test_masks_that_do_not_show_padding_are_refused():
    model = models.qwen3_moe()
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    with RouterMeter(model), pytest.raises(OrdMoERuntimeError, match=r"got \(3, 1, 7, 7\)"):
        model(input_ids=models.text_batch()["input_ids"], attention_mask=mask)


def test_an_interrupted_training_forward_does_not_count_later_ones():
    """Its closing hook does not run, and the meter must not take the next forward for a part of it."""
    model, batch = models.qwen3_moe().train(), models.text_batch()

    def interrupt(*_):
        raise KeyboardInterrupt

    with RouterMeter(model, training_only=True) as meter:
        handle = MoEModel.of(model).layers[0].router.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        handle.remove()
        with torch.no_grad():
            model.eval()(**batch)
    assert meter.report() == []


def test_routers_that_draw_draw_the_same_with_a_meter():
    subject = Subject(next(row for row in installed_rows() if row.name == "PhimoeForCausalLM"))
    model, logits = subject.adapted().train(), []
    for measured in (False, True):
        torch.manual_seed(4)
        with RouterMeter(model, training_only=True) if measured else nullcontext():
            logits.append(model(**subject.batch).logits)
    assert torch.equal(*logits)
