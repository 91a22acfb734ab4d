"""The trainer on the shipped vision-language base and real images, dense and in 4 bits."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTTrainer

from examples.easy_vqa.data import load_easy_vqa
from ordmoe import main
from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, OrdMoETrainer, rollout, tier_routing
from ordmoe_peft.data.samples import scoring_inputs
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers
from tests import models
from tests.training.test_trainer import arguments, trained


BASE = "examples/easy_vqa/base"


@pytest.fixture(scope="module")
def dataset():
    return load_easy_vqa()["train"].select(range(0, 160, 10))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


def adapted(quantized: bool, num_tiers: int = 3):
    config = MoeBitsAndBytesConfig() if quantized else None
    model = AutoModelForImageTextToText.from_pretrained(BASE, quantization_config=config)
    torch.manual_seed(0)
    return get_peft_model(model, OrdMoEConfig(r=4, num_tiers=num_tiers))


def trainer_for(cls, folder, model, dataset, processor, **changes):
    args = arguments(folder, max_length=None, per_device_train_batch_size=8, **changes)
    return cls(model, args=args, train_dataset=dataset, processing_class=processor)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])
def test_one_tier_without_balance_is_sft_to_the_bit(tmp_path, dataset, processor, quantized):
    results = [
        trained(trainer_for(cls, tmp_path, adapted(quantized, 1), dataset, processor, balance_coef=0.0, max_steps=3))
        for cls in (SFTTrainer, OrdMoETrainer)
    ]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_tier_likelihoods_are_those_of_passes_of_their_own(tmp_path, dataset, processor):
    model = adapted(quantized=False)
    models.randomize_adapter(model)
    trainer = trainer_for(OrdMoETrainer, tmp_path, model, dataset, processor)
    samples = list(dataset.select(range(6)))
    model.eval()
    with torch.no_grad():
        trainer.compute_loss(model, dict(scoring_inputs(samples, processor)))
        for tier in (1, 2, 3):
            inputs = scoring_inputs(samples, processor)
            labels = inputs.pop("labels")[:, 1:]
            with tier_routing(model, tier):
                log_probs = model(**inputs).logits[:, :-1].log_softmax(-1)
            token = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
            wanted = (token.sum(1) / (labels != -100).sum(1)).mean().item()
            assert trainer._metrics["eval"][f"tier_{tier}/log_likelihood"][-1] == pytest.approx(wanted, abs=1e-4)


def test_4_bit_training_saving_and_reloading(tmp_path, dataset, processor):
    model = adapted(quantized=True)
    one_batch = dataset.select(range(8))
    trainer = trainer_for(OrdMoETrainer, tmp_path, model, one_batch, processor, max_steps=8, learning_rate=3e-3)
    losses, _ = trained(trainer)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(BASE, quantization_config=MoeBitsAndBytesConfig())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = scoring_inputs(list(dataset.select(range(4))), processor)
    inputs.pop("labels")
    # TRL trains the adapters of 4-bit bases in bf16; PEFT loads what was saved in fp32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16
            parameter.data = parameter.data.float()
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_the_shipped_base_answers(processor):
    """Its card says how well, on the whole test split; a hundred questions tell that it sees."""
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    questions = load_easy_vqa()["test"].shuffle(seed=1).select(range(100))
    (result,) = evaluate_tiers(model, processor, questions, group_by="kind", batch_size=50, max_new_tokens=4)
    assert result.accuracy["overall"] > 0.78


@pytest.mark.parametrize("token_scope", ["sequence", "response"])
def test_generated_responses_to_images_are_those_of_rollouts(tmp_path, dataset, processor, token_scope):
    """Two ways to the same: from a collated batch in training, and from left-padded prompts in rollouts."""
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(BASE), OrdMoEConfig(r=4, token_scope=token_scope)
    )
    models.randomize_adapter(model)
    trainer = trainer_for(
        OrdMoETrainer,
        tmp_path / "run",
        model,
        dataset,
        processor,
        responses="generated",
        temperature=0.0,
        max_completion_length=4,
        objective="plackett_luce",
    )
    samples = dataset.select(range(6))
    with torch.no_grad():
        trainer.compute_loss(model.eval(), dict(scoring_inputs(list(samples), processor)))
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    written = rollout(model, processor, samples, tmp_path / "rollouts", do_sample=False, max_new_tokens=4)
    for tier in (1, 2, 3):
        likelihoods = [row[tier - 1] for row in written["log_likelihood"]]
        assert logged[f"tier_{tier}/log_likelihood"] == pytest.approx(sum(likelihoods) / 6, abs=1e-5)
        lengths = [row[tier - 1] for row in written["response_token_counts"]]
        assert logged[f"tier_{tier}/response_length"] == pytest.approx(sum(lengths) / 6)


def test_the_command_trains_alike_with_its_tiers_one_after_another(tmp_path, dataset):
    """Three steps of the recipe's 4-bit base, with clipping and the middle tier watched."""
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    logs = {}
    for mode in ("batched", "sequential"):
        changes = {"output_dir": tmp_path / mode, "dataset_name": tmp_path / "data", "tier_passes": mode}
        changes |= {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "log_tiers_every": 1}
        changes |= {"warmup_steps": 0, "use_cpu": True, "erl_coef": 0.1}
        options = [str(part) for name, value in changes.items() for part in (f"--{name}", value)]
        assert main(["train", "--config", "examples/recipes/easy_vqa.yaml", *options]) == 0
        state = json.loads((tmp_path / mode / "trainer_state.json").read_text())
        logs[mode] = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs["batched"]) == 3
    for one, other in zip(logs["batched"], logs["sequential"], strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
