"""What the tier passes run, skip and score, against one slow pass per tier."""

import pytest
import torch

from ordmoe_peft import tier_routing
from ordmoe_peft.objectives import preference
from ordmoe_peft.objectives.advantages import tier_advantages
from ordmoe_peft.tiers.plan import RandomDraw
from ordmoe_peft.tiers.scope import tiers_of_labels
from ordmoe_peft.training.row_layout.separate import left_padded_prompts
from tests import models, text
from tests.training.test_trainer import adapted, one_batch, trainer_for


BETA = {"logistic": 1.0, "plackett_luce": 1.0, "dpo": 0.1, "ipo": 0.1, "simpo": 2.0}


def token_log_probs(model, ids, mask, labels, tier, token_scope="sequence"):
    """Log-probability of each label under a tier, 0 where there is none, from a plain forward (`(B, S)`)."""
    tiers = tiers_of_labels(torch.full((len(ids),), tier), labels, token_scope)
    with tier_routing(model, tiers):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(targets == -100, 0)


def means(log_probs, labels):
    return log_probs.sum(1) / (labels[:, 1:] != -100).sum(1)


def gradients(loss, model):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def assert_same(trainer, batch, wanted):
    """The trainer's loss of the batch is `wanted`, and so are all gradients."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    true = gradients(wanted, trainer.model)
    for name, gradient in gradients(got, trainer.model).items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-3, atol=1e-6, msg=name)


def rows_run(trainer, batch) -> list[int]:
    """Number of rows of each forward that a training step's loss takes."""
    rows = []
    handle = trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.compute_loss(trainer.model.train(), dict(batch))
    handle.remove()
    return rows


@pytest.mark.parametrize("advantages", ["zscore", "center", "none"])
@pytest.mark.parametrize("num_tiers", [2, 3, 4, 5])
def test_gradients_with_the_skip_are_those_of_all_tiers(tmp_path, num_tiers, advantages):
    model = adapted(lambda: models.qwen3_moe(num_experts=12), num_tiers=num_tiers, advantages=advantages)
    trainer = trainer_for(tmp_path, model, erl_coef=0.3, balance_coef=0.0, log_tiers_every=0)
    batch = one_batch(trainer)
    likelihood, first = [], None
    for tier in range(1, num_tiers + 1):
        tokens = token_log_probs(model, batch["input_ids"], batch["attention_mask"], batch["labels"], tier)
        first = tokens if tier == 1 else first
        likelihood.append(means(tokens, batch["labels"]))
    ntp = -first.sum() / (batch["labels"][:, 1:] != -100).sum()
    erl = -(torch.stack(likelihood, 1) * tier_advantages(None, num_tiers, advantages)).sum(1).mean()
    assert_same(trainer, batch, ntp + 0.3 * erl)


@pytest.mark.parametrize(
    ("num_tiers", "advantages", "objective", "passes"),
    [
        (3, "zscore", "erl", 2),
        (3, "none", "erl", 2),
        (4, "zscore", "erl", 4),
        (4, "zscore", "logistic", 2),
        (3, "zscore", "plackett_luce", 3),
    ],
)
def test_tiers_without_a_gradient_are_run_only_to_be_logged(tmp_path, num_tiers, advantages, objective, passes):
    model = adapted(num_tiers=num_tiers, advantages=advantages)
    trainer = trainer_for(tmp_path, model, objective=objective, log_tiers_every=4)
    batch = one_batch(trainer)
    trainer.state.global_step = 3
    assert rows_run(trainer, batch) == [4 * passes]
    assert sum("log_likelihood_no_eos" in name for name in trainer._metrics["train"]) == passes
    trainer.state.global_step = 4
    skipped = num_tiers - passes
    assert rows_run(trainer, batch) == ([4 * skipped, 4 * passes] if skipped else [4 * passes])
    assert sum("log_likelihood_no_eos" in name for name in trainer._metrics["train"]) == num_tiers


@pytest.mark.parametrize("objective", sorted(BETA))
def test_other_objectives_see_each_tiers_likelihood(tmp_path, objective):
    model = adapted()
    trainer = trainer_for(tmp_path, model, objective=objective, erl_coef=0.3, balance_coef=0.0)
    batch = one_batch(trainer)
    args = (batch["input_ids"], batch["attention_mask"], batch["labels"])
    tokens = [token_log_probs(model, *args, tier) for tier in (1, 2, 3)]
    with torch.no_grad(), model.disable_adapter():
        base = [token_log_probs(model, *args, tier) for tier in (1, 2, 3)]
    mean, sums = torch.stack([means(t, batch["labels"]) for t in tokens], 1), torch.stack(tokens).sum(-1).T
    base_mean, base_sum = torch.stack([means(t, batch["labels"]) for t in base], 1), torch.stack(base).sum(-1).T
    loss = {
        "logistic": lambda: preference.logistic_loss(mean, 1.0),
        "plackett_luce": lambda: preference.plackett_luce_loss(mean, 1.0),
        "dpo": lambda: preference.dpo_loss(sums, base_sum, 0.1),
        "ipo": lambda: preference.ipo_loss(mean, base_mean, 0.1),
        "simpo": lambda: preference.simpo_loss(mean, 2.0, 0.5),
    }[objective]()
    ntp = -tokens[0].sum() / (batch["labels"][:, 1:] != -100).sum()
    assert_same(trainer, batch, ntp + 0.3 * loss)


@pytest.mark.parametrize("scored_by", ["tier", "policy"])
@pytest.mark.parametrize("token_scope", ["sequence", "response"])
def test_generated_responses_are_each_tiers_own(tmp_path, scored_by, token_scope):
    """Written by decoding one token at a time without a cache, then scored row by row."""
    model = adapted(num_tiers=2, token_scope=token_scope)
    trainer = trainer_for(
        tmp_path,
        model,
        responses="generated",
        scored_by=scored_by,
        temperature=0.0,
        max_completion_length=4,
        erl_coef=0.3,
        balance_coef=0.0,
    )
    batch = one_batch(trainer)
    model.eval()
    likelihood = torch.zeros(4, 2)
    columns = []
    for tier in (1, 2):
        rows = []
        for row in range(4):
            prompt = batch["input_ids"][row][: int((batch["labels"][row] != -100).int().argmax())]
            ids = prompt[None]
            while (ids.shape[1] < len(prompt) + 4 and ids[0, -1] != models.EOS) or ids.shape[1] == len(prompt):
                labels = torch.where(torch.arange(ids.shape[1] + 1) >= len(prompt), 1, -100)[None]
                tiers = tiers_of_labels(torch.tensor([tier]), labels, token_scope)
                with torch.no_grad(), tier_routing(model, tiers[:, :-1] if tiers.dim() == 2 else tiers):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            tokens = token_log_probs(
                model, ids, torch.ones_like(ids), labels, tier if scored_by == "tier" else 1, token_scope
            )
            rows.append(means(tokens, labels)[0])
        columns.append(torch.stack(rows))
    likelihood = torch.stack(columns, 1)
    first = token_log_probs(model, batch["input_ids"], batch["attention_mask"], batch["labels"], 1)
    ntp = -first.sum() / (batch["labels"][:, 1:] != -100).sum()
    erl = -(likelihood * tier_advantages(None, 2, "zscore")).sum(1).mean()
    assert_same(trainer, batch, ntp + 0.3 * erl)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["tier_2/log_likelihood"] == pytest.approx(likelihood[:, 1].mean().item(), abs=1e-5)
    assert 1 <= logged["tier_2/response_length"] <= 4


def test_random_groups_are_drawn_alike_in_writing_and_scoring(tmp_path):
    """Greedy decoding says itself what it gave each token; prompts differ in length, so they are padded in writing."""
    model = adapted(grouping="random")
    settings = {"responses": "generated", "temperature": 0.0, "max_completion_length": 4}
    trainer = trainer_for(tmp_path, model, **settings)
    batch = one_batch(trainer)
    prompts = left_padded_prompts(batch, models.PAD)
    assert (prompts["attention_mask"] == 0).any()
    trainer.state.global_step = 7
    model.eval()
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch))
        rows = len(prompts["input_ids"])
        with tier_routing(model, [3] * rows, draw=RandomDraw(step=7, num_samples=rows)):
            output = model.generate(
                **prompts, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
    values = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert not (output.sequences[:, prompts["input_ids"].shape[1] :] == models.EOS).any()
    assert trainer._metrics["eval"]["tier_3/log_likelihood"][-1] == pytest.approx(values.mean().item(), abs=1e-4)


def test_token_scope_leaves_prompts_on_tier_1(tmp_path):
    model = adapted(num_tiers=2, token_scope="response")
    trainer = trainer_for(tmp_path, model, erl_coef=0.3, balance_coef=0.0)
    batch = one_batch(trainer)
    args = (batch["input_ids"], batch["attention_mask"], batch["labels"])
    tokens = [token_log_probs(model, *args, tier, "response") for tier in (1, 2)]
    likelihood = torch.stack([means(t, batch["labels"]) for t in tokens], 1)
    whole = means(token_log_probs(model, *args, 2), batch["labels"])
    assert not torch.allclose(likelihood[:, 1], whole, atol=1e-3)
    ntp = -tokens[0].sum() / (batch["labels"][:, 1:] != -100).sum()
    erl = -(likelihood * tier_advantages(None, 2, "zscore")).sum(1).mean()
    assert_same(trainer, batch, ntp + 0.3 * erl)


def test_sampling_repeats_after_a_resumption(tmp_path):
    """Six steps at once, and three and three: the same adapter, so the same responses were drawn."""
    settings = {
        "responses": "generated",
        "max_completion_length": 4,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "erl_coef": 0.3,
    }
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer_for(tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    other = trainer_for(tmp_path / "other", seed=1, data_seed=42, **settings)
    other.train()
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name

    def lengths(trainer):
        return [entry["tier_3/log_likelihood"] for entry in trainer.state.log_history if "loss" in entry]

    assert lengths(resumed)[3:] == lengths(whole)[3:]
    assert lengths(other) != lengths(whole)


def test_prompts_alone_train_from_the_routing(tmp_path):
    dataset = text.conversations().remove_columns(["completion"])
    trainer = trainer_for(
        tmp_path, dataset=dataset, responses="generated", ntp_coef=0.0, max_completion_length=3, max_steps=1
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.01 * logged["erl_loss"] + 0.001 * logged["balance_loss"], abs=1e-4)
