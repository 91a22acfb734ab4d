import pytest
import torch

from ordmoe_peft.ops.dispatch import best_tile, combine_by_token, group_by_expert, lay_out_by_expert


ROUTINGS = {
    "mixed": [[2, 0], [0, 3], [2, 3]],
    "one token": [[1, 4]],
    "all on one expert": [[3], [3], [3]],
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_each_block_holds_the_rows_of_its_expert(routing):
    index_TK = torch.tensor(routing)
    groups = group_by_expert(index_TK, num_experts=5)
    start = 0
    for expert, end in enumerate(groups.ends_E.tolist()):
        rows = groups.order_N[start:end]
        assert (index_TK.reshape(-1)[rows] == expert).all()
        assert torch.equal(groups.token_N[start:end], rows // index_TK.shape[1])
        start = end
    assert sorted(groups.order_N.tolist()) == list(range(index_TK.numel()))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_combine_sums_the_rows_of_each_token(routing):
    index_TK = torch.tensor(routing)
    groups = group_by_expert(index_TK, num_experts=5)
    rows_NH = torch.randn(index_TK.numel(), 6)
    expected = torch.zeros(len(index_TK), 6)
    for place, token in enumerate(groups.token_N.tolist()):
        expected[token] += rows_NH[place]
    torch.testing.assert_close(combine_by_token(rows_NH, groups), expected)


LAYOUTS = {"without gaps": {}, "few tiles": {"tile_cost": 100}, "many tiles": {"tile_cost": 1, "row_step": 2}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_each_tile_holds_rows_of_one_expert(routing, layout):
    index_TK = torch.tensor(routing)
    tiles = lay_out_by_expert(index_TK, **layout)
    slots = len(tiles.token_S)
    assert slots == len(tiles.expert_P) * tiles.tile == sum(tiles.sizes)
    assert len(set(tiles.slot_N.tolist())) == index_TK.numel(), "no two rows share a slot"
    for place, slot in enumerate(tiles.slot_N.tolist()):
        assert tiles.token_S[slot] == place // index_TK.shape[1]
        assert tiles.expert_P[slot // tiles.tile] == index_TK.reshape(-1)[place]
    blank = tiles.blank_gaps_(torch.ones(slots, 1)).squeeze(1) == 0
    gaps = blank.nonzero().squeeze(1).tolist()
    assert sorted(gaps + tiles.slot_N.tolist()) == list(range(slots))
    assert bool(gaps) <= bool(layout), "gaps only for the sake of tiles"
    # The blocks to multiply hold all rows of their expert and nobody else's.
    numbered = torch.arange(slots).unsqueeze(1)
    for expert, block in tiles.blocks(numbered):
        mine = {
            slot for slot, e in zip(tiles.slot_N.tolist(), index_TK.reshape(-1).tolist(), strict=True) if e == expert
        }
        others = set(tiles.slot_N.tolist()) - mine
        assert mine <= set(block.flatten().tolist())
        assert not others & set(block.flatten().tolist())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_slots_go_back_to_their_tokens(layout):
    index_TK = torch.tensor(ROUTINGS["mixed"])
    tiles = lay_out_by_expert(index_TK, **layout)
    x_TH = torch.randn(len(index_TK), 6)
    rows = tiles.rows(x_TH)
    assert torch.equal(tiles.by_token(rows), x_TH.unsqueeze(1).expand(-1, 2, -1))
    torch.testing.assert_close(tiles.sum_by_token(rows), 2 * x_TH)
    blanked = tiles.blank_gaps_(rows)
    assert torch.equal(tiles.sum_by_token(blanked), 2 * x_TH)
    torch.testing.assert_close(blanked.abs().sum(), 2 * x_TH.abs().sum())


@pytest.mark.parametrize("r_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("routing", [*ROUTINGS.values(), [[0, 1], [2, 3], [4, 0], [0, 1]]])
def test_tiles_are_summed_by_expert(routing, layout, r_first):
    tiles = lay_out_by_expert(torch.tensor(routing), **layout)
    x_PRI = torch.randn(len(tiles.expert_P), 3, 8)
    wanted_ERI = torch.zeros(5, 3, 8)
    for expert, x_RI in zip(tiles.expert_P.tolist(), x_PRI, strict=True):
        wanted_ERI[expert] += x_RI
    got = tiles.sum_by_expert(x_PRI, 5, r_first)
    torch.testing.assert_close(got, wanted_ERI.transpose(0, 1) if r_first else wanted_ERI)


def test_the_tile_grows_with_its_cost_and_stays_within_the_largest_block():
    assert best_tile([5, 5, 5], tile_cost=0) == 1
    assert best_tile([30, 32, 31], tile_cost=16) == 32, "even loads: one tile each"
    assert best_tile([1000, *[10] * 100], tile_cost=16) < 100, "one large load does not fill the others' tiles up"
    assert best_tile([30, 29], tile_cost=16, row_step=8) == 32
    assert best_tile([1, 1], tile_cost=16, row_step=8) == 1, "few rows are left as they are"
