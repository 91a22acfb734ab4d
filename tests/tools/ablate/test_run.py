import pytest
import torch

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.tools.ablate.run import evaluate_run, tier_likelihoods, train_run
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers
from tests import models, text


TOKENIZER = text.tokenizer()


def trained(folder, num_tiers=3, seed=0, **changes):
    args = OrdMoETrainingArguments(
        str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True, "learning_rate": 1e-2},
        **changes,
    )
    config = OrdMoEConfig(r=4, num_tiers=num_tiers)
    return train_run(models.qwen3_moe, config, args, seed, text.conversations(), TOKENIZER)


def evaluated(model, dataset=None):
    return evaluate_run(
        model,
        TOKENIZER,
        dataset or text.conversations(6),
        scores_tiers=True,
        batch_size=4,
        group_by="kind",
        max_new_tokens=3,
    )


@pytest.fixture
def seen(monkeypatch) -> list[list[int]]:
    """Token ids of each training batch, in order."""
    batches, step = [], OrdMoETrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(OrdMoETrainer, "training_step", training_step)
    return batches


def test_runs_of_one_seed_see_the_same_samples_in_the_same_order(tmp_path, seen):
    orders = {}
    for num_tiers, seed, data_seed in ((1, 0, None), (3, 0, None), (3, 1, None), (3, 1, 0)):
        seen.clear()
        trained(tmp_path, num_tiers, seed, data_seed=data_seed)
        orders[num_tiers, seed, data_seed] = list(seen)
        assert len(seen) == 4
    assert orders[1, 0, None] == orders[3, 0, None] == orders[3, 1, 0]
    assert orders[3, 1, None] != orders[3, 0, None]


def test_the_same_settings_give_the_same_result_whatever_ran_before(tmp_path):
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        model, record = trained(tmp_path)
        results.append((evaluated(model)["log_likelihood"], record["train_loss"], record["history"]))
    assert results[0] == results[1]
    assert results[0][0] != evaluated(trained(tmp_path, seed=1)[0])["log_likelihood"]


def test_the_record_of_training_and_evaluation(tmp_path):
    model, record = trained(tmp_path, logging_steps=1)
    assert record["steps"] == 4
    assert record["seconds_per_step"] == pytest.approx(record["train_seconds"] / 4)
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4]
    assert "ntp_loss" in record["history"][-1]
    evaluation = evaluated(model)
    top, _, bottom = evaluate_tiers(model, TOKENIZER, text.conversations(6), (1, 2, 3), max_new_tokens=3)
    assert evaluation["is_right"] == [int(is_right) for is_right in top.items.is_right]
    assert evaluation["log_likelihood"] == pytest.approx(top.items.log_likelihood, abs=1e-5)
    assert evaluation["accuracy"].keys() == {"overall", "even", "odd"}
    assert evaluation["tier_log_likelihood"][0] == pytest.approx(top.log_likelihood, abs=1e-5)
    assert evaluation["tier_log_likelihood"][2] == pytest.approx(bottom.log_likelihood, abs=1e-5)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("experts", [8, 4])
def test_a_model_without_tiers_is_cut_into_as_many_as_fit(experts):
    """Two of eight experts at a time: three tiers; two of four: two."""
    model, dataset = models.qwen3_moe(num_experts=experts), text.conversations(3)
    likelihoods = tier_likelihoods(model, TOKENIZER, dataset, 2, [-1.0] * 3)
    assert len(likelihoods) == min(3, experts // 2)
    last = len(likelihoods)
    (bottom,) = evaluate_tiers(model, TOKENIZER, dataset, (last,), max_new_tokens=1, num_tiers=last)
    assert likelihoods[-1] == pytest.approx(bottom.log_likelihood, abs=1e-5)
