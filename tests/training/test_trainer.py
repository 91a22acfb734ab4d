"""The trainer against TRL's own and against losses put together from one pass per tier."""

import re

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from trl import SFTTrainer

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments, tier_routing
from ordmoe_peft.adapter.saved import SavedAdapter
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError, OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.monitoring.recording import recorded_router_outputs
from ordmoe_peft.objectives.advantages import tier_advantages
from ordmoe_peft.tiers.plan import RandomDraw
from tests import models, reference, text
from tests.adapter.test_hub import hub  # noqa: F401 (a fixture)


SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def arguments(folder, **changes) -> OrdMoETrainingArguments:
    return OrdMoETrainingArguments(str(folder), **(SETTINGS | changes))


def adapted(build=models.qwen3_moe, **settings):
    torch.manual_seed(0)
    model = get_peft_model(build(), OrdMoEConfig(**({"r": 4, "targets": ["router", "experts"]} | settings)))
    models.randomize_adapter(model)
    return model


def trainer_for(folder, model=None, cls=OrdMoETrainer, dataset=None, **changes):
    return cls(
        adapted() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=text.conversations() if dataset is None else dataset,
        processing_class=text.tokenizer(),
    )


def trained(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("build", [models.qwen3_moe, models.olmoe, models.mixtral], ids=lambda build: build.__name__)
def test_one_tier_without_balance_is_sft_to_the_bit(build, tmp_path):
    results = [
        trained(trainer_for(tmp_path, adapted(build, num_tiers=1), cls, balance_coef=0.0))
        for cls in (SFTTrainer, OrdMoETrainer)
    ]
    (sft_losses, sft_weights), (losses, weights) = results
    assert losses == sft_losses
    assert len(losses) == 4
    assert losses[0] != losses[-1]
    assert all(torch.equal(weights[name], sft_weights[name]) for name in sft_weights)


def one_batch(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def likelihoods(model, batch, num_tiers, **draw):
    """L̄ of each sample and tier, `(B, C)`, from one pass per tier, and tier 1's token log-probabilities."""
    columns, first = [], None
    labels = batch["labels"][:, 1:]
    for tier in range(1, num_tiers + 1):
        with tier_routing(model, tier, draw=RandomDraw(num_samples=len(labels), **draw)):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        token = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        token = token.masked_fill(labels == -100, 0)
        first = token if first is None else first
        columns.append(token.sum(1) / (labels != -100).sum(1))
    return torch.stack(columns, dim=1), first


@pytest.mark.parametrize("grouping", ["uniform", "high_only", "random"])
@pytest.mark.parametrize(("num_tiers", "rewards", "advantages"), [(2, None, "zscore"), (3, [2, 1.5, 0], "none")])
def test_loss_and_gradients_are_those_of_one_pass_per_tier(tmp_path, grouping, num_tiers, rewards, advantages):
    model = adapted(num_tiers=num_tiers, rewards=rewards, advantages=advantages, grouping=grouping)
    trainer = trainer_for(tmp_path, model, erl_coef=0.3, balance_coef=0.0, log_tiers_every=5)
    batch = one_batch(trainer)
    trainer.state.global_step = 5
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    likelihood, first = likelihoods(model, batch, num_tiers, step=5)
    ntp = -first.sum() / (batch["labels"][:, 1:] != -100).sum()
    erl = -(likelihood * tier_advantages(rewards, num_tiers, advantages)).sum(1).mean()
    wanted = ntp + 0.3 * erl
    got = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    wanted_gradients = torch.autograd.grad(wanted, parameters.values(), allow_unused=True)
    got_gradients = torch.autograd.grad(got, parameters.values(), allow_unused=True)
    for name, mine, true in zip(parameters, got_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-6, msg=name)

    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["ntp_loss"] == pytest.approx(ntp.item(), abs=1e-5)
    assert metrics["erl_loss"] == pytest.approx(erl.item(), abs=1e-5)
    for tier in range(1, num_tiers + 1):
        assert metrics[f"tier_{tier}/log_likelihood"] == pytest.approx(likelihood[:, tier - 1].mean().item(), abs=1e-5)


@pytest.mark.parametrize("num_tiers", [1, 3])
@pytest.mark.parametrize("build", [models.qwen3_moe, models.olmoe, models.mixtral], ids=lambda build: build.__name__)
def test_balance_is_added_once_from_tier_1_and_without_padding(tmp_path, build, num_tiers):
    model = adapted(build, num_tiers=num_tiers)
    with_balance = trainer_for(tmp_path, model, erl_coef=0.0, balance_coef=0.5)
    batch = one_batch(with_balance)
    assert (batch["attention_mask"] == 0).any()
    model.train()
    total = with_balance.compute_loss(model, dict(batch))
    router_logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).router_logits
    mask = batch["attention_mask"].reshape(-1)
    balance = torch.stack(
        [reference.balance_loss(logits, logits.topk(models.TOP_K).indices, mask) for logits in router_logits]
    ).mean()
    metrics = {name: values[-1] for name, values in with_balance._metrics["train"].items()}
    assert metrics["balance_loss"] == pytest.approx(balance.item(), abs=1e-5)
    assert total.item() == pytest.approx(metrics["ntp_loss"] + 0.5 * balance.item(), abs=1e-5)
    assert "aux_loss" not in metrics


def test_balance_has_its_gradient_under_the_default_checkpointing(tmp_path):
    gradients = {}
    for checkpointing in (False, True):
        for coef in (0.0, 10.0):
            model = adapted()
            trainer = trainer_for(tmp_path, model, balance_coef=coef, gradient_checkpointing=checkpointing)
            if checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            model.train()
            trainer.compute_loss(model, one_batch(trainer)).backward()
            gradients[checkpointing, coef] = model.get_parameter(
                "base_model.model.model.layers.1.mlp.gate.lora_B.default.weight"
            ).grad
    torch.testing.assert_close(gradients[True, 10.0], gradients[False, 10.0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients[True, 10.0], gradients[True, 0.0], rtol=0.1)


def test_balance_under_reentrant_checkpointing_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(OrdMoEModelError, match="use_reentrant.*balance_coef=0"):
        trainer.train()


def test_balance_where_only_experts_are_adapted(tmp_path):
    """Below the first router nothing trains, so its logits alone have no gradient; above the last layer is none."""
    model = adapted(targets=["experts"])
    trainer = trainer_for(tmp_path, model, erl_coef=0.0, ntp_coef=0.0, balance_coef=1.0)
    trainer.compute_loss(model.train(), one_batch(trainer)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for layer, has_gradient in enumerate([True, True, False]):
        largest = max(g.abs().max().item() for name, g in gradients.items() if f"layers.{layer}." in name)
        assert (largest > 0) == has_gradient


def test_one_tier_takes_padding_free_batches(tmp_path):
    trainer = trainer_for(tmp_path, adapted(num_tiers=1), padding_free=True, max_length=None)
    trainer.train()
    assert 0.5 < trainer.state.log_history[0]["balance_loss"] < models.NUM_EXPERTS


def test_one_tier_keeps_its_weight(tmp_path):
    losses = [
        trainer.compute_loss(trainer.model.train(), one_batch(trainer)).item()
        for coef in (1.0, 0.5)
        for trainer in [trainer_for(tmp_path, adapted(num_tiers=1), balance_coef=0.0, ntp_coef=coef)]
    ]
    assert losses[1] == pytest.approx(0.5 * losses[0], rel=1e-5)


def test_rows_without_tokens_do_not_count_in_likelihoods(tmp_path):
    """Two rows have no response, one has a word and an end, one an end alone."""
    model = adapted()
    trainer = trainer_for(tmp_path, model)
    batch = one_batch(trainer)
    labels = torch.full_like(batch["labels"], -100)
    ends = (batch["attention_mask"].sum(1) - 1).tolist()
    batch["input_ids"][[0, 1], ends[:2]] = models.EOS
    labels[[0, 1], ends[:2]] = models.EOS
    labels[0, ends[0] - 1] = batch["input_ids"][0, ends[0] - 1]
    batch["labels"] = labels
    model.eval()
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    word, first_end, second_end = tokens[0, ends[0] - 2], tokens[0, ends[0] - 1], tokens[1, ends[1] - 1]
    metrics = trainer._metrics["eval"]
    wanted = ((word + first_end) / 2 + second_end) / 2
    assert metrics["tier_1/log_likelihood"] == [pytest.approx(wanted.item(), abs=1e-5)]
    assert metrics["tier_1/log_likelihood_no_eos"] == [pytest.approx(word.item(), abs=1e-5)]
    batch["labels"] = torch.full_like(labels, -100)
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch))
    assert len(metrics["tier_1/log_likelihood"]) == 1


def test_lower_tier_floor_stops_low_tiers_from_falling(tmp_path):
    """With a huge coefficient the bottom tier runs away; with the floor above all its tokens it is left alone."""
    last = {}
    for floor in (None, "0"):
        trainer = trainer_for(
            tmp_path, erl_coef=1.0, balance_coef=0.0, max_steps=12, lower_tier_floor=floor, learning_rate=3e-2
        )
        trainer.train()
        last[floor] = [entry["tier_3/log_likelihood"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last[None] < -6
    assert last["0"] > last[None] + 2


def test_training_raises_tier_1_over_the_bottom_and_logs_every_tier(tmp_path):
    trainer = trainer_for(tmp_path, erl_coef=0.1, max_steps=12)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {f"tier_{tier}/log_likelihood{end}" for tier in (1, 2, 3) for end in ("", "_no_eos")} <= logs[0].keys()
    assert logs[-1]["tier_1/log_likelihood"] > logs[0]["tier_1/log_likelihood"] + 0.5
    assert logs[-1]["tier_3/log_likelihood"] < logs[-1]["tier_1/log_likelihood"] - 0.5


def test_accumulated_small_batches_are_one_large_batch(tmp_path):
    dataset = text.conversations(vary_length=False)
    changes = {"max_steps": 2, "balance_coef": 0.0, "erl_coef": 0.1, "dataset": dataset}
    _, whole = trained(trainer_for(tmp_path, per_device_train_batch_size=4, **changes))
    _, parts = trained(trainer_for(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **changes))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_logs_the_tiers_too(tmp_path):
    metrics = trainer_for(tmp_path).evaluate(text.conversations())
    assert metrics["eval_tier_1/log_likelihood"] != metrics["eval_tier_3/log_likelihood"]


def test_peft_config_is_taken_as_by_trl_and_the_adapter_and_its_card_are_saved(tmp_path):
    trainer = OrdMoETrainer(
        models.qwen3_moe(),
        args=arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=text.conversations(),
        processing_class=text.tokenizer(),
        peft_config=OrdMoEConfig(r=4),
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "README.md").exists()  # TRL's draft, beside no adapter
    assert "2511.19023" in ModelCard.load(checkpoint / "README.md").text
    run = trainer.model.ordmoe_training
    assert (run["figures"]["steps"], [point["step"] for point in run["curves"]]) == (4, [1, 2, 3, 4])
    assert run["data"] == {"rows": 8, "columns": ["prompt", "completion", "kind"]}
    assert run["objective"]["objective"] == "erl"
    assert "tier_3/log_likelihood" in run["curves"][0]
    assert SavedAdapter.read(checkpoint).record["training"] == run


def test_what_a_trainer_uploads_is_of_one_save_and_has_a_card(tmp_path, hub):  # noqa: F811
    run = trainer_for(
        tmp_path / "run",
        **{"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "every_save", "hub_always_push": True},
        **{"save_strategy": "steps", "save_steps": 2, "max_steps": 3},
    )
    run.train()
    pushed = SavedAdapter.read(hub.folder)
    assert pushed.record["training"]["figures"]["steps"] == 3  # at the end of training, too
    pushed.check_checksum()
    card = ModelCard.load(hub.folder / "README.md")
    assert re.findall(r"^\| (\d+) \|", card.text, re.MULTILINE) == ["1", "2", "3"]  # a row for each step
    run.push_to_hub(dataset_name="me/questions", tags="mine")
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.datasets == ["me/questions"]
    assert {"mine", "trl"} <= set(card.data.tags)
    assert "None" not in str(card)


class TestRefusals:
    def test_no_ordmoe_adapter(self, tmp_path):
        for model in (models.qwen3_moe(), get_peft_model(models.qwen3_moe(), LoraConfig(target_modules=["q_proj"]))):
            with pytest.raises(OrdMoEConfigError, match="needs a model with an active OrdMoE adapter"):
                trainer_for(tmp_path, model)

    def test_a_data_set_without_answers(self, tmp_path):
        dataset = text.conversations().remove_columns("completion")
        with pytest.raises(OrdMoEDataError, match=r"\['kind', 'prompt'\], none of which holds an answer"):
            trainer_for(tmp_path, dataset=dataset)


def test_balance_counts_the_experts_that_a_router_with_a_bias_and_groups_chose(tmp_path):
    """DeepSeek-V3 chooses by sigmoid plus bias within groups: other experts than those of the largest probabilities."""
    model = adapted(models.deepseek_v3, num_tiers=1)
    layers = MoEModel.of(model).layers
    for layer in layers:
        layer.router.e_score_correction_bias.copy_(torch.linspace(-2, 2, models.NUM_EXPERTS))
    trainer = trainer_for(tmp_path, model, balance_coef=0.5)
    batch = one_batch(trainer)
    model.train()
    with recorded_router_outputs(model) as outputs:
        trainer.compute_loss(model, dict(batch))
    index = [output.index_TK for output in outputs]
    assert any(
        not torch.equal(i.sort().values, o.logits_TE.topk(models.TOP_K).indices.sort().values)
        for i, o in zip(index, outputs, strict=True)
    )
    mask = batch["attention_mask"].reshape(-1)
    wanted = torch.stack([reference.balance_loss(output.logits_TE, output.index_TK, mask) for output in outputs]).mean()
    assert trainer._metrics["train"]["balance_loss"][-1] == pytest.approx(wanted.item(), abs=1e-5)


def test_plain_text_data_sets_work(tmp_path):
    dataset = Dataset.from_dict({"text": ["w10 w11 w12 w13", "w20 w21 w22"] * 4})
    losses, _ = trained(trainer_for(tmp_path, dataset=dataset))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(tmp_path):
    """The head's positions are picked by a hook of each forward, which a compiled one must not keep from the first."""
    plain, _ = trained(trainer_for(tmp_path))
    compiled, _ = trained(trainer_for(tmp_path, torch_compile=True, torch_compile_backend="eager"))
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_a_subclass_that_drops_what_travels_with_the_batch_is_told(tmp_path):
    class Dropping(OrdMoETrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            known = {name: inputs[name] for name in ("input_ids", "labels", "attention_mask")}
            return super().compute_loss(model, known, *args, **kwargs)

    with pytest.raises(OrdMoEConfigError, match=r"Dropping did not give inputs\['tier_pass'\]"):
        trainer_for(tmp_path, cls=Dropping).train()


def test_settings_of_the_loss_may_change_during_a_run(tmp_path):
    trainer = trainer_for(tmp_path, objective="logistic", objective_beta=1.0)
    batch = one_batch(trainer)
    before = trainer.compute_loss(trainer.model, dict(batch))
    trainer.args.objective_beta = 5.0
    assert trainer.compute_loss(trainer.model, dict(batch)) != before
