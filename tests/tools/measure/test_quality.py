import json
import math

import pytest
import torch

from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers, generate_answers
from ordmoe_peft.tools.measure.quality import ORDERS, order_share, tier_quality
from tests import models, text


TOKENIZER = text.tokenizer()


def measure(dataset, **settings):
    settings = {"batch_size": 4, "max_new_tokens": 3, "diversity_tokens": 16} | settings
    return tier_quality(models.qwen3_moe(), TOKENIZER, dataset, **settings)


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
        assert (full.share, full.chance, full.random) == (0.25, 1 / 6, None)
        assert full.stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 4))

    def test_two_tiers(self):
        """The first over the last in three of four; random groups in one of two."""
        share = order_share(torch.tensor([[-1.0, -1, -1, -3], [-3, -2, -2, -1]]), torch.tensor([[0.0, 0], [-1, 0]]))
        assert (share.share, share.chance, share.random) == (0.75, 0.5, 0.5)
        assert share.random_stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 2))

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
            return [(order.random, order.random_stderr) for order in quality.order.values()]

        first = shares()
        assert all(0 < share < 1 for share, _ in first), "random groups are neither tier 1 itself nor always worse"
        assert first == shares()
        assert first != shares(seed=1)
        assert shares(random_control=False) == [(None, None)] * 4


def test_to_dict_is_plain_json_with_all_parts():
    dataset = own_answers(5).add_column("score", [1.0, 2.0, 5.0, 4.0, 3.0])
    quality = measure(dataset, num_tiers=2, grouping="high_only", group_by="kind", rating_column="score", show=2)
    data = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert (data["num_samples"], data["num_tiers"], data["grouping"]) == (5, 2, "high_only")
    assert [tier["tier"] for tier in data["tiers"]] == [1, 2]
    assert data["tiers"][0]["accuracy"] == {"even": pytest.approx(2 / 3), "odd": 1.0, "overall": pytest.approx(0.8)}
    assert data["order"].keys() == {"full", "ends", "full_no_eos", "ends_no_eos"}
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
    assert list(tiers.frame) == ["tier", "even", "odd", "overall", "log-likelihood", "without end tokens"]
    assert tiers.frame["overall"].tolist() == [tier.accuracy["overall"] for tier in quality.tiers]
    assert order.frame["samples"].tolist() == [quality.order[key].share for key in ORDERS]
    assert set(order.texts()["random groups"]) == {"—"}
    assert layers.frame["cosine tier 2"].tolist()[:-1] == [cosines[1] for cosines in quality.diversity]
    assert layers.texts().iloc[-1]["MoE layer"] == "overall"
    assert texts.frame["tier 1"][0] == quality.texts[0].answers[0]
    quality.texts = []
    assert len(quality.tables()) == 3


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
