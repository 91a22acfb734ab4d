"""One row with a branch for each tier, against a row for each tier."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import pad
from trl.trainer.utils import add_fused_lm_head

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.data.generation import with_responses
from ordmoe_peft.objectives.expert_rank import mean_log_likelihood
from ordmoe_peft.tiers.plan import RandomDraw
from ordmoe_peft.training.row_groups import row_groups
from ordmoe_peft.training.row_layout.prompt_sharing import PromptSharing
from ordmoe_peft.training.row_layout.separate import left_padded_prompts
from ordmoe_peft.training.row_layout.shared_prompt import branch_mask, shared_prompt_rows
from ordmoe_peft.training.tier_passes import TierForward
from tests import models


# (prompt tokens, response tokens) of each row: ordinary ones, a response of one token, none, a prompt of one token.
LENGTHS = [(5, 4), (9, 1), (6, 0), (1, 7), (3, 3)]


def rows(lengths=LENGTHS, padding: int = 1, seed: int = 5) -> dict[str, torch.Tensor]:
    """Right-padded rows of random tokens, `padding` of them in the longest row, and labels on their responses."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(prompt + response for prompt, response in lengths) + padding)
    length, prompt = torch.tensor([sum(pair) for pair in lengths]), torch.tensor([pair[0] for pair in lengths])
    column = torch.arange(shape[1])
    mask = column < length[:, None]
    ids = torch.randint(1, models.IMAGE_TOKEN, shape, generator=generator).where(mask, models.PAD)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.where(mask & (column >= prompt[:, None]), -100),
    }


def image_rows() -> dict[str, torch.Tensor]:
    """Rows with an image in each prompt, which is as long in all."""
    batch = models.image_batch(4)
    prompt = batch["input_ids"].shape[1]
    text = rows([(0, length) for length in (6, 1, 3, 0)], padding=0)
    ids = torch.cat([batch["input_ids"].where(batch["attention_mask"].bool(), 7), text["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(batch["attention_mask"]), text["attention_mask"]], 1)
    return batch | {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": pad(text["labels"], (prompt, 0), value=-100),
        "mm_token_type_ids": (ids == models.IMAGE_TOKEN).long(),
    }


def adapted(build: Callable = models.qwen3_moe, attention: str = "sdpa", num_tiers: int = 3, **settings):
    model = build()
    model.set_attn_implementation(attention)
    targets = ["router", "experts", "attention"]
    config = OrdMoEConfig(r=4, targets=targets, num_tiers=num_tiers, token_scope="response", **settings)
    model = get_peft_model(model, config)
    models.randomize_adapter(model)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def sharing_of(model) -> PromptSharing:
    return PromptSharing(model, models.PAD, model.dtype)


def results(
    model,
    batch,
    num_tiers: int,
    sharing: PromptSharing | None,
    *,
    tiers=None,
    generated=None,
    scored_by="tier",
    needs_balance=True,
    **settings,
):
    """What a step has of its one pass: the loss, TRL's outputs, what is scored, and all gradients."""
    groups = row_groups(batch, tiers or range(1, num_tiers + 1), generated, scored_by)
    forward = TierForward(model, model, models.PAD, sharing, draw=RandomDraw(step=3), needs_balance=needs_balance)
    (tier_pass,) = forward.passes(groups, num_tiers, **settings)
    outputs, scores = tier_pass.run(), tier_pass.scores
    ranked = mean_log_likelihood(scores.log_probs_CBS, scores.mask_CBS) * torch.linspace(1, -1, num_tiers)[:, None]
    loss = scores.ntp_loss - 0.3 * ranked.sum(0).mean() + 0.1 * scores.balance_loss
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), outputs, scores, gradients


def assert_same(got, wanted, tolerance: float = 1e-5):
    """To rounding: sums over tokens run in another order."""
    (loss, outputs, scores, gradients), (true_loss, true_outputs, true_scores, true_gradients) = got, wanted
    torch.testing.assert_close(loss, true_loss, rtol=tolerance, atol=0)
    assert torch.equal(scores.labels_CBS, true_scores.labels_CBS)
    torch.testing.assert_close(scores.log_probs_CBS, true_scores.log_probs_CBS, rtol=0, atol=tolerance)
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(outputs, name), getattr(true_outputs, name), rtol=0, atol=tolerance)
    if scores.reference_CBS is not None:
        torch.testing.assert_close(scores.reference_CBS, true_scores.reference_CBS, rtol=0, atol=tolerance)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - true_gradients[name]).norm() / true_gradients[name].norm().clamp(min=1e-6)
        assert difference < tolerance, name


def assert_shared_like_rows(model, batch, num_tiers: int = 3, **settings):
    sharing = sharing_of(model)
    got = results(model, batch, num_tiers, sharing, **settings)
    assert sharing.is_possible and sharing.is_judged
    assert_same(got, results(model, batch, num_tiers, None, **settings))


def test_layout():
    """Two rows, worked out by hand: prompts 11 12 13 and 31, answered by 21 22 and 41 42; 0 is padding."""
    batch = {
        "input_ids": torch.tensor([[11, 12, 13, 21, 22], [31, 41, 42, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 21, 22], [-100, 41, 42, -100, -100]]),
        "pixel_values": torch.ones(3),
    }
    shared = shared_prompt_rows([batch, batch], [1, 3], torch.arange(5).expand(2, 5) + 100, pad_token_id=0)
    assert shared.inputs["input_ids"].tolist() == [[11, 12, 13, 21, 22, 13, 21], [31, 41, 42, 31, 41, 0, 0]]
    assert shared.inputs["shift_labels"].tolist() == [
        [-100, -100, 21, 22, -100, 21, 22],
        [41, 42, -100, 41, 42, -100, -100],
    ]
    assert shared.inputs["position_ids"][0].tolist() == [100, 101, 102, 103, 104, 102, 103]
    assert shared.inputs["position_ids"][1, :5].tolist() == [100, 101, 102, 100, 101]
    assert shared.tiers.tolist() == [[1, 1, 1, 1, 1, 3, 3], [1, 1, 1, 3, 3, 1, 1]]
    assert shared.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 0, 1, -1, -1]]
    assert shared.segments_NS.tolist() == [[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, -1, -1]]
    assert shared.index_GNW.tolist() == [[[0, 1, 2, 3], [0, 1, 2, -1]], [[-1, -1, 5, 6], [3, 4, -1, -1]]]
    assert shared.inputs.keys() == {"input_ids", "shift_labels", "position_ids", "pixel_values"}


@pytest.mark.parametrize("window", [None, 3])
def test_tokens_see_the_prompt_and_their_own_branch(window):
    batch = rows()
    shape = batch["labels"].shape
    shared = shared_prompt_rows([batch] * 3, [1, 2, 3], torch.arange(shape[1]).expand(shape), models.PAD)
    mask = branch_mask(shared, window)[:, 0]
    for row, (prompt, response) in enumerate(LENGTHS):
        tokens = [(column, None if column < prompt - 1 else 1) for column in range(prompt + response)]
        tokens += [(prompt - 1 + step, tier) for tier in (2, 3) for step in range(response)]
        if response == 0:
            tokens = [(column, None) for column in range(prompt - 1)] + [(prompt - 1, 1)]
        for query, (column, tier) in enumerate(tokens):
            seen = [
                other <= column and own in (None, tier) and (window is None or column - other < window)
                for other, own in tokens
            ]
            assert mask[row, query, : len(tokens)].tolist() == seen
            assert not mask[row, query, len(tokens) :].any()
    assert mask.any(-1).all(), "a token that sees nothing, not even itself, is no number in some attention functions"


@pytest.mark.parametrize(("num_tiers", "attention"), [(2, "sdpa"), (3, "sdpa"), (3, "eager"), (4, "sdpa")])
def test_loss_and_gradients_are_those_of_separate_rows(family, num_tiers, attention):
    batch = image_rows() if family == "qwen3_vl_moe" else rows()
    assert_shared_like_rows(adapted(models.FAMILIES[family], attention, num_tiers), batch, num_tiers)


def test_what_differs_is_rounding(monkeypatch):
    """The same in float64, but for the softmax of routers; torch's grouped product does not take it, so a loop does."""

    def grouped_mm(left, right, *, offs, **kwargs):
        starts = [0, *offs.tolist()]
        if left.dim() == right.dim() == 2:  # gradients of stacks: columns of the one by rows of the other
            return torch.stack([left[:, a:b] @ right[a:b] for a, b in pairwise(starts)])
        return torch.cat([left[a:b] @ right[e] for e, (a, b) in enumerate(pairwise(starts))])

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    model, batch = adapted().double(), rows()
    assert_same(results(model, batch, 3, sharing_of(model)), results(model, batch, 3, None), tolerance=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, batch = adapted(), rows()
    settings = {"needs_balance": not use_reentrant}  # which cuts router logits off
    wanted = results(model, batch, 3, None, **settings)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(results(model, batch, 3, sharing_of(model), **settings), wanted)


def test_random_groups_are_drawn_for_the_places_of_separate_rows():
    assert_shared_like_rows(adapted(grouping="random"), rows())


@pytest.mark.parametrize(
    ("build", "attention"), [(models.mixtral, "sdpa"), (models.mixtral, "eager"), (models.gpt_oss, "eager")]
)
def test_sliding_windows_reach_back_along_the_branch(build, attention):
    """Windows of three tokens: in all layers of Mixtral, in every other one of gpt-oss."""
    assert_shared_like_rows(adapted(lambda: build(sliding_window=3), attention), rows())


def test_reference_and_logged_tiers_share_prompts_as_well():
    settings = {"tiers": [1, 2], "logged_tiers": [3, 4], "needs_reference": True}
    assert_shared_like_rows(adapted(num_tiers=4), rows(), 4, **settings)


def test_spans_between_responses_are_part_of_the_branch():
    """Two turns: what lies between the answers depends on the first one, so each tier has its own, on tier 1."""
    batch = rows()
    batch["labels"][1, 4:7] = batch["input_ids"][1, 4:7]
    assert_shared_like_rows(adapted(), batch)


@pytest.mark.parametrize("scored_by", ["tier", "policy"])
@pytest.mark.parametrize("grouping", ["uniform", "random"])
def test_responses_of_the_tiers_own(scored_by, grouping):
    """Prompts padded on the left, as `generate` reads them, and responses longer and shorter than the batch's own."""
    batch = rows()
    prompts = left_padded_prompts(batch, models.PAD)
    generated = []
    for longest in (2, 9, 5):
        ids = torch.randint(1, models.IMAGE_TOKEN, (len(LENGTHS), longest))
        lengths = torch.randint(1, longest + 1, (len(LENGTHS), 1))
        generated.append(with_responses(prompts, ids, torch.arange(longest) < lengths))
    assert_shared_like_rows(adapted(grouping=grouping), batch, generated=generated, scored_by=scored_by)
