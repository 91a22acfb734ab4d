"""The answer to a router's choice: rows on tier 1 beside others, and what `random` grouping draws."""

import torch

from ordmoe_peft import tier_routing
from ordmoe_peft.tiers.plan import RandomDraw
from tests import models
from tests.tiers.test_routing import logits, watched_routing


def test_mixed_rows_on_tier_1_choose_what_the_router_chose(model, batch):
    with watched_routing(model) as seen:
        logits(model, batch)
    first_layer = seen[0]["index"].clone()
    rows = len(batch["input_ids"])
    with watched_routing(model) as seen, tier_routing(model, [1] * (rows - 1) + [2]):
        logits(model, batch)
    tokens = len(first_layer) // rows * (rows - 1)
    assert torch.equal(seen[0]["index"][:tokens], first_layer[:tokens])


class TestRandom:
    def routing(self, model, batch, tier, num_tiers=None, seed=None, **draw):
        settings = {"grouping": "random", "num_tiers": num_tiers, "seed": seed, "draw": RandomDraw(**draw)}
        with watched_routing(model) as seen, tier_routing(model, tier, **settings):
            logits(model, batch)
        return [record["index"] for record in seen]

    def test_repeats_and_depends_on_seed_and_step(self, model, batch):
        first = self.routing(model, batch, 2)
        assert all(map(torch.equal, first, self.routing(model, batch, 2)))
        assert not torch.equal(first[0], self.routing(model, batch, 2, seed=1)[0])
        assert not torch.equal(first[0], self.routing(model, batch, 2, step=1)[0])

    def test_tiers_of_a_token_are_disjoint(self, model, batch):
        # In the first layer all tiers see the same scores.
        tiers = [self.routing(model, batch, tier, num_tiers=4)[0] for tier in (1, 2, 3, 4)]
        for experts in torch.cat(tiers, dim=1).tolist():
            assert sorted(experts) == list(range(models.NUM_EXPERTS))

    def test_repeated_samples_draw_the_same(self, model, batch):
        once = self.routing(model, batch, 2)[0]
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        rows = len(batch["input_ids"])
        assert torch.equal(self.routing(model, twice, 2, num_samples=rows)[0][len(once) :], once)

    def test_a_sample_draws_the_same_in_whichever_part_of_a_batch_it_is(self, model, batch):
        rows = len(batch["input_ids"])
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        whole = self.routing(model, twice, 2)[0].view(2, -1, models.TOP_K)
        parts = [self.routing(model, batch, 2, first_sample=first)[0] for first in (0, rows)]
        assert all(map(torch.equal, whole, parts))
        assert not torch.equal(*parts)

    def test_rows_that_generation_repeats_draw_the_same(self, model, batch):
        """Beam search repeats each row of a tier in place: both copies are the sample that the row is of."""
        rows = len(batch["input_ids"])
        once = self.routing(model, batch, [2] * rows, num_samples=rows)[0].view(rows, -1, models.TOP_K)
        repeated = {
            name: value.view(rows, -1, *value.shape[1:]).repeat_interleave(2, 0).flatten(0, 1)
            for name, value in batch.items()
        }
        beams = self.routing(model, repeated, [2] * rows, num_samples=rows)[0].view(2 * rows, -1, models.TOP_K)
        assert torch.equal(beams, once.repeat_interleave(2, 0))
