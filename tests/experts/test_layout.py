import pytest
import torch

from ordmoe_peft.experts.layout import bin_experts, lay_out_by_expert, slots_for, split_bins, with_gap


ROUTINGS = {
    "mixed": [[2, 0], [0, 3], [2, 3]],
    "one token": [[1, 4]],
    "all on one expert": [[3], [3], [3]],
}


LAYOUTS = {
    "without gaps": {},
    "in bins": {"bin_cost": 4},
    "in steps": {"bin_cost": 4, "row_step": 2},
    "two at a time": {"bin_cost": 4, "row_step": 2, "block_experts": 2},
    "all at a time": {"bin_cost": 1000, "block_experts": 99},
}


def slots_of(chunk) -> list[int]:
    return list(range(chunk.slots.start, chunk.slots.stop))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_experts", [5, 40])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_slots_hold_the_rows_of_their_expert(routing, num_experts, layout):
    index_TK = torch.tensor(routing)
    most = layout.get("block_experts", 1)
    layout = lay_out_by_expert(index_TK, num_experts, **layout)
    assert [slot for chunk in layout.chunks for slot in slots_of(chunk)] == list(range(len(layout.token_S)))
    assert len(set(layout.slot_N.tolist())) == index_TK.numel(), "no two rows share a slot"
    expert_of = dict(zip(layout.slot_N.tolist(), index_TK.reshape(-1).tolist(), strict=True))
    for place, slot in enumerate(layout.slot_N.tolist()):
        assert layout.token_S[slot] == place // index_TK.shape[1]
    gaps = set(range(len(layout.token_S))) - set(expert_of)
    assert all(layout.token_S[slot] == len(index_TK) for slot in gaps), "gaps read the row after the last token"
    multiplied = []
    for chunk in layout.chunks:
        # Slots of a block are of its experts in turn, and hold all their rows and nobody else's.
        numbered_M1 = torch.tensor(slots_of(chunk)).unsqueeze(1)
        for experts, block in chunk.by_block(numbered_M1):
            its = torch.arange(num_experts)[experts].tolist()
            assert len(its) <= most
            for expert, slots in zip(its, block.squeeze(-1).tolist(), strict=True):
                mine = {slot for slot, other in expert_of.items() if other == expert}
                assert mine == set(slots) & set(expert_of)
                multiplied.append(expert)
        # What no block multiplies is zeroed, and nothing else.
        x_M1 = torch.ones(len(slots_of(chunk)), 1)
        for _, block in chunk.by_block(x_M1):
            block.fill_(2)
        chunk.zero_rest_(x_M1)
        assert not (x_M1 == 1).any()
    assert sorted(multiplied) == index_TK.unique().tolist()


def test_neighbours_in_a_bin_are_a_slice_and_need_no_gathering():
    index_TK = torch.tensor([[0, 1], [2, 3], [0, 2], [4, 1], [3, 5]])
    (chunk,) = lay_out_by_expert(index_TK, 8, bin_cost=1000, block_experts=4).chunks
    assert [block.experts for block in chunk.blocks] == [slice(0, 4), slice(4, 6)]
    (chunk,) = lay_out_by_expert(index_TK * 2, 16, bin_cost=1000, block_experts=4).chunks
    assert [block.experts.tolist() for block in chunk.blocks] == [[0, 2, 4, 6], [8, 10]]


@pytest.mark.parametrize("num_experts", [5, 40])
@pytest.mark.parametrize("routing", [*ROUTINGS.values(), torch.randint(5, (90, 2)).tolist()])
def test_slots_of_a_bin_are_in_the_order_of_its_experts(routing, num_experts):
    index_TK = torch.tensor(routing)
    layout = lay_out_by_expert(index_TK, num_experts, bin_cost=4)
    expert_of = dict(zip(layout.slot_N.tolist(), index_TK.reshape(-1).tolist(), strict=True))
    for chunk in layout.chunks:
        slots_of_bins = chunk.by_bin(torch.tensor(slots_of(chunk)).unsqueeze(1))
        for slots_BM1, experts_B in zip(slots_of_bins, chunk.factors_by_bin(layout.expert_P), strict=True):
            for slots_M1, expert in zip(slots_BM1, experts_B.tolist(), strict=True):
                assert {expert_of.get(slot, expert) for slot in slots_M1.flatten().tolist()} == {expert}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_slots_go_back_to_their_tokens(layout):
    index_TK = torch.tensor(ROUTINGS["mixed"])
    slots = lay_out_by_expert(index_TK, 5, **layout)
    x_TH = torch.randn(len(index_TK), 6)
    rows = torch.cat([slots.rows(chunk, with_gap(x_TH)) for chunk in slots.chunks])
    assert torch.equal(slots.by_token(rows), x_TH.unsqueeze(1).expand(-1, 2, -1))
    torch.testing.assert_close(slots.sum_by_token(rows), 2 * x_TH)


@pytest.mark.parametrize("r_first", [False, True])
@pytest.mark.parametrize("num_experts", [5, 40])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("routing", [*ROUTINGS.values(), [[0, 1], [2, 3], [4, 0], [0, 1]]])
def test_what_slots_give_goes_back_to_their_experts(routing, layout, num_experts, r_first):
    slots = lay_out_by_expert(torch.tensor(routing), num_experts, **layout)
    factor_PRI = torch.randn(len(slots.expert_P), 3, 8)
    x_PRI = slots.empty_for(num_experts, factor_PRI)
    x_PRI[: len(factor_PRI)] = factor_PRI
    wanted_ERI = torch.zeros(num_experts, 3, 8)
    wanted_ERI[slots.expert_P] = factor_PRI
    got = slots.by_expert(x_PRI, num_experts, r_first)
    assert torch.equal(got, wanted_ERI.transpose(0, 1) if r_first else wanted_ERI)


def test_bins_are_few_and_nearly_full():
    assert bin_experts([32, 31, 30, 30], 64) == [(4, 32)], "even loads: one bin"
    assert bin_experts([1000, *[10] * 99], 64) == [(1, 1024), (96, 10), (2, 10), (1, 10)], (
        "one load does not fill others up"
    )
    assert bin_experts([1000, 1000, 0, 0], 64) == [(2, 1024)], "experts without rows take no slots of note"
    assert bin_experts([9, *[8] * 4, *[0] * 123], 64) == [(8, 10)], "but complete a group"
    assert bin_experts([0, 0], 64) == [(1, 0)]


def test_bins_of_any_shape_are_fewer():
    assert bin_experts([41, 40, 7, *[3] * 4, 0], 8, row_step=8, few_shapes=False) == [(2, 48), (3, 7), (2, 3)]
    loads = sorted((torch.rand(128) ** 3 * 400).long().tolist(), reverse=True)
    bins = bin_experts(loads, 192, row_step=8, few_shapes=False)
    slots = [slots for experts, slots in bins for _ in range(experts)]
    assert all(rows <= room for rows, room in zip(loads, slots, strict=False)) and not any(loads[len(slots) :])
    assert sum(slots) <= sum(loads) + 7 * 128 + 192 * len(bins)
    assert len(bins) < len(bin_experts(loads, 192, row_step=8))


@pytest.mark.parametrize("num_experts", [8, 60, 128, 256])
def test_bins_take_in_all_rows(num_experts):
    loads = sorted((torch.rand(num_experts) ** 3 * 400).long().tolist(), reverse=True)
    bins = bin_experts(loads, 192, row_step=4)
    slots = [slots for experts, slots in bins for _ in range(experts)]
    assert all(rows <= room for rows, room in zip(loads, slots, strict=False)) and not any(loads[len(slots) :])
    own = sum(slots_for(rows, row_step=4) for rows in loads)
    assert sum(slots) <= own + 192 * len(bins)
    assert len(bins) < 24


def test_chunks_take_in_all_bins_and_are_not_small():
    bins = [(2, 2000), (8, 100), (8, 100), (8, 100), (100, 30), (3, 1)]
    assert split_bins(bins, 2048) == [bins[:1], bins[1:4], bins[4:5], bins[5:]]
    assert split_bins([], 2048) == []


def test_few_sizes_serve_all_loads():
    sizes = {rows: slots_for(rows, row_step=4) for rows in range(1, 1025)}
    assert all(rows <= slots < max(4 + rows, 1.25 * rows) for rows, slots in sizes.items())
    assert len(set(sizes.values())) < 35
    assert slots_for(1, row_step=4) == 1, "few rows are left as they are"
