import json
import math
from collections import defaultdict

import pytest
import torch

from ordmoe_peft import tier_routing
from ordmoe_peft.data.samples import scoring_inputs
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError
from ordmoe_peft.tiers.plan import RandomDraw
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers, generate_answers
from ordmoe_peft.tools.measure.quality import ORDERS, order_share, tier_quality
from tests import models, reference, text


TOKENIZER = text.tokenizer()


def model_of(sharpness: float):
    """At 1 the model is sure of no token, at 4 of some, at 1,000 of all."""
    model = models.qwen3_moe()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def measure(dataset, sharpness=1, **settings):
    settings = {"batch_size": 4, "max_new_tokens": 3, "diversity_tokens": 16} | settings
    return tier_quality(model_of(sharpness), TOKENIZER, dataset, **settings)


def own_answers(count: int):
    """Samples whose references are the model's own answers, but for the last."""
    dataset = text.conversations(count)
    answers = generate_answers(models.qwen3_moe(), TOKENIZER, list(dataset), max_new_tokens=3)
    answers[-1] = "something else"
    return dataset.map(
        lambda row, index: row | {"completion": [{"role": "assistant", "content": answers[index]}]}, with_indices=True
    )


class TestOrder:
    def test_shares_by_hand(self):
        """Four samples in columns: in order, tie at the top, tie at the bottom, reversed; one of four is in order."""
        likelihoods = torch.tensor([[-1.0, -1, -1, -3], [-2, -1, -2, -2], [-3, -2, -2, -1]])
        full = order_share(likelihoods)
        assert (full.share, full.chance, full.random, full.num_samples) == (0.25, 1 / 6, None, 4)
        assert full.stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 4))

    def test_two_tiers(self):
        """The first over the last in three of four; random groups in one of two."""
        share = order_share(torch.tensor([[-1.0, -1, -1, -3], [-3, -2, -2, -1]]), torch.tensor([[0.0, 0], [-1, 0]]))
        assert (share.share, share.chance, share.random) == (0.75, 0.5, 0.5)
        assert share.random_stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 2))

    def test_what_is_not_a_number_is_in_no_order(self):
        """One of three in order; no share without samples."""
        nan = float("nan")
        likelihoods = torch.tensor([[-1.0, nan, -1], [-2, -2, nan]])
        share = order_share(likelihoods, likelihoods.flip(0))
        assert (share.share, share.num_samples, share.random) == (1 / 3, 3, 0)
        nothing = order_share(likelihoods[:, :0], likelihoods[:, :0])
        assert (nothing.share, nothing.stderr, nothing.random, nothing.random_stderr) == (None, None, None, None)
        assert (nothing.chance, nothing.num_samples) == (0.5, 0)

    def test_tiers_below_1_on_the_tokens_that_tier_1_tells_apart(self):
        """Each sample is a batch, so that nothing is padded, and each batch draws random groups of its own."""
        dataset, model, means = text.conversations(12), model_of(4), defaultdict(list)
        quality = measure(dataset, sharpness=4, batch_size=1, max_new_tokens=1, show=0, seed=5)
        for step, sample in enumerate(dataset):
            inputs = scoring_inputs([sample], TOKENIZER)
            label_S = inputs.pop("labels")[0, 1:].tolist()
            random = {"grouping": "random", "seed": 5, "draw": RandomDraw(step=step)}
            logits = {}
            for name, tier in (("share", 1), ("share", 2), ("share", 3), ("random", 2), ("random", 3)):
                with torch.no_grad(), tier_routing(model, tier, **(random if name == "random" else {})):
                    logits[name, tier] = model(**inputs).logits[0, :-1]
            for name, tier in logits:
                confident, fragile = reference.likelihood_by_class(logits[name, tier], logits["share", 1], label_S)
                for kind, values in (("_confident", confident), ("_fragile", fragile), ("", confident + fragile)):
                    means[kind, name, tier] += [sum(values) / len(values)] if values else []
        for kind in ("", "_confident", "_fragile"):
            order = quality.order[f"below{kind}"]
            assert (order.chance, order.num_samples) == (0.5, len(means[kind, "share", 1]))
            for name in ("share", "random"):
                falls = [a > b for a, b in zip(means[kind, name, 2], means[kind, name, 3], strict=True)]
                assert getattr(order, name) == pytest.approx(sum(falls) / len(falls)), (kind, name)
            expected = [sum(means[kind, "share", tier]) / order.num_samples for tier in (1, 2, 3)]
            assert [getattr(tier, f"log_likelihood{kind}") for tier in quality.tiers] == pytest.approx(
                expected, abs=1e-4
            )
        counts = [quality.order[key].num_samples for key in ("full", "below_confident", "below_fragile")]
        assert counts[0] == 12 > min(counts[1:]) > 0, "some samples have no token of a class"

    def test_nothing_is_below_tier_1_of_two(self):
        quality = measure(text.conversations(3), num_tiers=2, max_new_tokens=1, show=0)
        assert [*quality.order] == [key for key in ORDERS if "below" not in key]
        assert quality.tables()[1].frame["likelihood falls from"].tolist() == [ORDERS[key] for key in quality.order]

    def test_comes_from_each_samples_likelihoods(self):
        dataset = text.conversations(6)
        quality = measure(dataset)
        results = evaluate_tiers(models.qwen3_moe(), TOKENIZER, dataset, (1, 2, 3), batch_size=4, max_new_tokens=3)
        for key, name in (("", "log_likelihood"), ("_no_eos", "log_likelihood_no_eos")):
            rows = list(zip(*(getattr(result.items, name) for result in results), strict=True))
            assert quality.order[f"full{key}"].share == pytest.approx(sum(a > b > c for a, b, c in rows) / 6)
            assert quality.order[f"ends{key}"].share == pytest.approx(sum(a > c for a, _, c in rows) / 6)
        assert [tier.log_likelihood for tier in quality.tiers] == [result.log_likelihood for result in results]
        assert quality.tiers[2].accuracy == results[2].accuracy

    def test_random_groups_repeat_by_seed(self):
        dataset = text.conversations(12)

        def shares(**settings):
            quality = measure(dataset, num_tiers=2, batch_size=12, max_new_tokens=1, show=0, **settings)
            return [(one.random, one.random_stderr) for one in quality.order.values()]

        first = shares()
        assert all(0 < share < 1 for share, _ in first), "random groups are neither tier 1 itself nor always worse"
        assert first == shares()
        assert first != shares(seed=1)
        assert shares(random_control=False) == [(None, None)] * 4


def test_to_dict_is_plain_json_with_all_parts():
    dataset = own_answers(5).add_column("score", [1.0, 2.0, 5.0, 4.0, 3.0])
    quality = measure(dataset, grouping="high_only", group_by="kind", rating_column="score", show=2)
    data = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert (data["num_samples"], data["num_tiers"], data["grouping"]) == (5, 3, "high_only")
    assert [tier["tier"] for tier in data["tiers"]] == [1, 2, 3]
    assert data["tiers"][0]["accuracy"] == {"even": pytest.approx(2 / 3), "odd": 1.0, "overall": pytest.approx(0.8)}
    assert data["order"].keys() == ORDERS.keys()
    assert data["spearman"]["quality"] == "rating"
    assert -1 <= data["spearman"]["within_top"]["overall"] <= 1
    assert len(data["diversity"]) == len(data["spearman"]["within_top"]["layers"]) == models.NUM_LAYERS
    assert all(-1 < cosine < 1 for layer in data["diversity"] for cosine in layer)
    first = data["texts"][0]
    assert first["prompt"] == dataset[0]["prompt"][0]["content"]
    assert first["reference"] == first["answers"][0] != first["answers"][1]
    assert len(data["texts"]) == 2


def test_tables_hold_the_same_figures():
    quality = measure(own_answers(5), group_by="kind", random_control=False, show=1)
    tiers, order, layers, texts = quality.tables()
    names = ["tier", "even", "odd", "overall", "log-likelihood", "without end tokens"]
    assert list(tiers.frame) == [*names, "confident tokens", "fragile tokens"]
    assert "The last two columns are means, over the samples that have such tokens" in tiers.note
    assert tiers.frame["overall"].tolist() == [tier.accuracy["overall"] for tier in quality.tiers]
    shares = [quality.order[key].share for key in ORDERS]
    assert order.frame["samples"].dropna().tolist() == [share for share in shares if share is not None]
    assert set(order.texts()["random groups"]) == {"—"}
    assert order.frame["number of samples"].tolist() == [quality.order[key].num_samples for key in ORDERS]
    assert layers.frame["cosine tier 2"].tolist()[:-1] == [cosines[1] for cosines in quality.diversity]
    assert layers.texts().iloc[-1]["MoE layer"] == "overall"
    assert texts.frame["tier 1"][0] == quality.texts[0].answers[0]
    quality.texts = []
    assert len(quality.tables()) == 3


@pytest.mark.parametrize(("sharpness", "share", "kind"), [(1, "0.0 %", "confident"), (1000, "100.0 %", "fragile")])
def test_a_class_that_no_token_is_in(sharpness, share, kind):
    quality = measure(text.conversations(3), sharpness=sharpness, max_new_tokens=1, show=0)
    data = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert data["confident_share"] == (kind == "fragile")
    assert [tier[f"log_likelihood_{kind}"] for tier in data["tiers"]] == [None] * 3
    assert data["order"][f"below_{kind}"]["share"] is None
    tiers, order, _ = quality.tables()
    assert f"{share} of {quality.num_tokens} tokens are confident" in tiers.note
    assert set(tiers.texts()[f"{kind} tokens"]) == {"—"}
    row = order.texts().set_index("likelihood falls from").loc[f"below tier 1, {kind} tokens"]
    assert row.tolist() == ["—", "—", "—", "—", "50.0 %", "0"]


def test_a_model_that_overflows_has_tokens_in_no_order():
    """Under every tier all logits are NaN: no sample is left out, none is in order, and no mean is taken for 0."""
    model = model_of(1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    quality = tier_quality(model, TOKENIZER, text.conversations(3), max_new_tokens=1, diversity_tokens=16, show=0)
    for key, order in quality.order.items():
        expected = (None, None, 0) if key == "below_confident" else (0.0, 0.0, 3)
        assert (order.share, order.random, order.num_samples) == expected, key
    for tier in quality.tiers:
        assert tier.log_likelihood_confident is None
        assert math.isnan(tier.log_likelihood_fragile)
    assert set(quality.tables()[0].texts()["fragile tokens"]) == {"—"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_tiers": 1}, "num_tiers must be at least 2"),
            ({"num_tiers": 5}, "num_tiers=5 does not fit"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"diversity_tokens": 0}, "diversity_tokens must be at least 1"),
            ({"grouping": "best"}, "grouping must be one of"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(OrdMoEConfigError, match=message):
            measure(text.conversations(2), **settings)

    def test_data(self):
        dataset = text.conversations(3)
        with pytest.raises(OrdMoEDataError, match="no samples"):
            measure(dataset.select([]))
        with pytest.raises(OrdMoEDataError, match="no column 'completion'"):
            measure(dataset.remove_columns("completion"))
        with pytest.raises(OrdMoEDataError, match="group_by='color'"):
            measure(dataset, group_by="color")
        with pytest.raises(OrdMoEDataError, match="rating_column='stars' is not a column"):
            measure(dataset, rating_column="stars")
