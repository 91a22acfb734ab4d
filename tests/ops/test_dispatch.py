import pytest
import torch

from ordmoe_peft.ops.dispatch import combine_by_token, group_by_expert


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
