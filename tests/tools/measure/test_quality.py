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

    def test_samples_without_such_tokens_are_left_out(self):
        """One of two in order, of three samples; no share where no sample has such tokens."""
        nan = float("nan")
        likelihoods = torch.tensor([[-1.0, nan, -1], [-2, nan, -1]])
        share = order_share(likelihoods, likelihoods[:, :2])
        assert (share.share, share.num_samples, share.random, share.random_stderr) == (0.5, 2, 1.0, 0.0)
        nothing = order_share(likelihoods[:, 1:2], likelihoods[:, 1:2])
        assert (nothing.share, nothing.stderr, nothing.random, nothing.random_stderr) == (None, None, None, None)
        assert (nothing.chance, nothing.num_samples) == (0.5, 0)

    def test_tier_1_says_what_is_confident_for_lower_tiers_and_random_groups(self):
        """Each sample is a batch, so that nothing is padded, and each batch draws random groups of its own."""
        dataset, model, means = text.conversations(12), model_of(4), defaultdict(list)
        quality = measure(dataset, sharpness=4, num_tiers=2, batch_size=1, max_new_tokens=1, show=0, seed=5)
        for step, sample in enumerate(dataset):
            inputs = scoring_inputs([sample], TOKENIZER)
            label_S = inputs.pop("labels")[0, 1:].tolist()
            random = {"grouping": "random", "seed": 5, "draw": RandomDraw(step=step)}
            logits = {}
            for name, tier, routing in (("top", 1, {}), ("share", 2, {}), ("random", 2, random)):
                with torch.no_grad(), tier_routing(model, tier, num_tiers=2, **routing):
                    logits[name] = model(**inputs).logits[0, :-1]
                confident, fragile = reference.likelihood_by_class(logits[name], logits["top"], label_S)
                means["confident", name] += [sum(confident) / len(confident)] if confident else []
                means["fragile", name] += [sum(fragile) / len(fragile)] if fragile else []
        for kind in ("confident", "fragile"):
            order, top, low = quality.order[f"ends_{kind}"], means[kind, "top"], means[kind, "share"]
            assert quality.order[f"full_{kind}"] == order
            assert 0 < order.num_samples == len(top)
            for name in ("share", "random"):
                falls = [a > b for a, b in zip(top, means[kind, name], strict=True)]
                assert getattr(order, name) == pytest.approx(sum(falls) / len(falls)), (kind, name)
            found = [getattr(tier, f"log_likelihood_{kind}") for tier in quality.tiers]
            assert found == pytest.approx([sum(top) / len(top), sum(low) / len(low)], abs=1e-4)

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
            return [(one.random, one.random_stderr) for key, one in quality.order.items() if "confident" not in key]

        first = shares()
        assert all(0 < share < 1 for share, _ in first), "random groups are neither tier 1 itself nor always worse"
        assert first == shares()
        assert first != shares(seed=1)
        assert shares(random_control=False) == [(None, None)] * 6


def test_to_dict_is_plain_json_with_all_parts():
    dataset = own_answers(5).add_column("score", [1.0, 2.0, 5.0, 4.0, 3.0])
    quality = measure(dataset, num_tiers=2, grouping="high_only", group_by="kind", rating_column="score", show=2)
    data = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert (data["num_samples"], data["num_tiers"], data["grouping"]) == (5, 2, "high_only")
    assert [tier["tier"] for tier in data["tiers"]] == [1, 2]
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
    quality = measure(own_answers(5), num_tiers=2, group_by="kind", random_control=False, show=1)
    tiers, order, layers, texts = quality.tables()
    names = ["tier", "even", "odd", "overall", "log-likelihood", "without end tokens"]
    assert list(tiers.frame) == [*names, "confident tokens", "fragile tokens"]
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
    quality = measure(text.conversations(3), sharpness=sharpness, num_tiers=2, max_new_tokens=1, show=0)
    data = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert data["confident_share"] == (kind == "fragile")
    assert [tier[f"log_likelihood_{kind}"] for tier in data["tiers"]] == [None, None]
    assert {data["order"][f"{order}_{kind}"]["share"] for order in ("full", "ends")} == {None}
    tiers, order, _ = quality.tables()
    assert f"{share} of {quality.num_tokens} tokens are confident" in tiers.note
    assert set(tiers.texts()[f"{kind} tokens"]) == {"—"}
    row = order.texts().set_index("likelihood falls from").loc[f"all in order, {kind} tokens"]
    assert row.tolist() == ["—", "—", "—", "—", "50.0 %", "0"]


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
