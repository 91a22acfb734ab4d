import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.data.rollouts import ROLLOUT_FEATURES, rollout
from ordmoe_peft.data.samples import prompt_inputs
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError
from ordmoe_peft.monitoring.recording import recorded_router_outputs
from ordmoe_peft.tiers.plan import RandomDraw
from tests import models, text


TOKENIZER = text.tokenizer()
GREEDY = {"do_sample": False, "max_new_tokens": 5}
SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 5}
TIERS = (1, 2, 3)


def ending_often(model):
    """Half of the vocabulary ends a response, so that responses differ in length and some are an end alone."""
    model.generation_config.eos_token_id = list(range(0, models.VOCAB_SIZE, 2))
    return model


def roll(output, dataset=None, model=None, **options):
    dataset = text.conversations(7) if dataset is None else dataset
    options = {"batch_size": 2, "samples_per_shard": 3, **SAMPLED, **options}
    return rollout(model or models.qwen3_moe(), TOKENIZER, dataset, output, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_tier_answers_as_generate_does_under_it_alone(tmp_path):
    model, dataset = models.qwen3_moe(), text.conversations(7)
    rollouts = roll(tmp_path, dataset, model, **GREEDY)
    assert rollouts["tiers"][:] == [list(TIERS)] * 7
    for sample, row in zip(dataset, rollouts, strict=True):
        inputs = prompt_inputs([sample], TOKENIZER)
        for tier, response, count in zip(TIERS, row["responses"], row["response_token_counts"], strict=True):
            with tier_routing(model, tier):
                alone = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
            assert response == TOKENIZER.decode(alone, skip_special_tokens=True)
            assert count == len(alone)
    assert any(len(set(row["responses"])) == 3 for row in rollouts)


@pytest.mark.parametrize("grouping", ["uniform", "random"])
def test_likelihood_is_that_of_the_tokens_as_they_were_written(tmp_path, grouping):
    """Greedy decoding says itself what it gave each token; random groups must be drawn alike in writing and scoring."""
    model, dataset = ending_often(models.qwen3_moe()), text.conversations(6)
    rollouts = roll(tmp_path, dataset, model, grouping=grouping, batch_size=3, **GREEDY)
    ends, seen_end_alone = torch.tensor(model.generation_config.eos_token_id), False
    for start in (0, 3):
        inputs = prompt_inputs([dataset[place] for place in range(start, start + 3)], TOKENIZER)
        for tier in TIERS:
            with tier_routing(model, tier, grouping=grouping, draw=RandomDraw(step=start, num_samples=3)):
                output = model.generate(**inputs, **GREEDY, output_scores=True, return_dict_in_generate=True)
            written = output.sequences[:, inputs["input_ids"].shape[1] :]
            scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
            for ids, values, row in zip(written, scores, rollouts.select(range(start, start + 3)), strict=True):
                is_end = torch.isin(ids, ends)
                length = int(is_end.int().argmax()) + 1 if is_end.any() else len(ids)
                content = values[:length][~is_end[:length]]
                assert row["response_token_counts"][tier - 1] == length
                assert row["log_likelihood"][tier - 1] == pytest.approx(values[:length].mean().item(), abs=1e-4)
                if len(content):
                    no_eos = row["log_likelihood_no_eos"][tier - 1]
                    assert no_eos == pytest.approx(content.mean().item(), abs=1e-4)
                else:
                    assert row["log_likelihood_no_eos"][tier - 1] is None
                    seen_end_alone = True
    assert seen_end_alone


def test_the_policy_scores_what_other_tiers_wrote(tmp_path):
    model, dataset = models.qwen3_moe(), text.conversations(3)
    by_tier = roll(tmp_path / "tier", dataset, model, **GREEDY)
    by_policy = roll(tmp_path / "policy", dataset, model, scored_by="policy", **GREEDY)
    assert by_policy["responses"][:] == by_tier["responses"][:]
    assert by_policy["gate_mass"][:] == by_tier["gate_mass"][:]
    for place, (sample, row) in enumerate(zip(dataset, by_policy, strict=True)):
        prompt = prompt_inputs([sample], TOKENIZER)["input_ids"]
        for tier, response in zip(TIERS, row["responses"], strict=True):
            # Five words, none of them an end, so that text and tokens say the same.
            ids = torch.cat([prompt, TOKENIZER(response, return_tensors="pt").input_ids], 1)
            assert ids.shape[1] - prompt.shape[1] == row["response_token_counts"][tier - 1]
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            expected = log_probs[prompt.shape[1] - 1 :].mean().item()
            assert row["log_likelihood"][tier - 1] == pytest.approx(expected, abs=1e-4)
            assert (by_tier[place]["log_likelihood"][tier - 1] == row["log_likelihood"][tier - 1]) == (tier == 1)


def test_gate_mass_is_the_probability_of_the_tiers_ranks(tmp_path):
    """OLMoE weights experts by their softmax; of 8 experts, 2 at a time, tiers are ranks 1–2, 4–5 and 7–8."""
    model, dataset = models.olmoe(), text.conversations(2)
    rollouts = roll(tmp_path, dataset, model, **GREEDY)
    for sample, row in zip(dataset, rollouts, strict=True):
        prompt = prompt_inputs([sample], TOKENIZER)["input_ids"]
        for tier, first_rank in zip(TIERS, (0, 3, 6), strict=True):
            ids = torch.cat([prompt, TOKENIZER(row["responses"][tier - 1], return_tensors="pt").input_ids], 1)
            assert ids.shape[1] - prompt.shape[1] == row["response_token_counts"][tier - 1]
            with torch.no_grad(), tier_routing(model, tier), recorded_router_outputs(model) as routing:
                model(ids)
            router_logits = torch.stack([output.logits_TE for output in routing])
            ranked = router_logits.softmax(-1).sort(-1, descending=True).values
            mass = ranked[..., first_rank : first_rank + 2].sum(-1)[:, prompt.shape[1] - 1 : -1]
            assert row["gate_mass"][tier - 1] == pytest.approx(mass.mean().item(), abs=1e-5)
        assert row["gate_mass"][0] > row["gate_mass"][1] > row["gate_mass"][2]


def test_a_folder_goes_on_where_it_stopped(tmp_path):
    whole = roll(tmp_path / "whole")
    assert sorted(contents(tmp_path / "whole")) == [
        "data/train-00000-of-00003.parquet",
        "data/train-00001-of-00003.parquet",
        "data/train-00002-of-00003.parquet",
        "rollout_settings.json",
    ]
    roll(tmp_path / "part")
    lost = tmp_path / "part/data/train-00001-of-00003.parquet"
    kept = lost.with_name("train-00000-of-00003.parquet")
    written_at = kept.stat().st_mtime_ns
    left_by_a_kill = lost.rename(lost.with_name(f".{lost.name}.123.partial"))
    torch.rand(3)
    again = roll(tmp_path / "part")
    assert again[:] == whole[:]
    assert kept.stat().st_mtime_ns == written_at
    left_by_a_kill.unlink()
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_the_seed_decides_the_responses(tmp_path):
    first, other = roll(tmp_path / "1", seed=1), roll(tmp_path / "2", seed=2)
    assert first["responses"][:] != other["responses"][:]
    same_questions = Dataset.from_list([text.conversations(1)[0]] * 4)
    first_batch, second_batch = roll(tmp_path / "3", same_questions)["responses"][::2]
    assert first_batch != second_batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed \(42 there, 1 now\)"),
        ({"scored_by": "policy"}, r"scored_by \('tier' there, 'policy' now\)"),
        ({"temperature": 0.5}, r"generation.temperature \(1.5 there, 0.5 now\)"),
        ({"top_k": 7}, r"generation.top_k \(None there, 7 now\)"),
        ({"dataset": text.conversations(6)}, r"num_samples \(7 there, 6 now\), texts_sha256"),
        ({"dataset": text.conversations(7).map(lambda row: {"completion": row["prompt"]})}, "texts_sha256"),
        ({"sources": {"adapter": "a"}}, r"sources.adapter \(None there, 'a' now\)"),
        ({"keep_columns": ["kind"]}, "columns"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_settings_are_refused_and_leave_the_folder_alone(tmp_path, changes, message):
    roll(tmp_path, dataset=text.conversations(7))
    before = contents(tmp_path)
    (tmp_path / "data/train-00000-of-00003.parquet").unlink()
    before.pop("data/train-00000-of-00003.parquet")
    with pytest.raises(OrdMoEConfigError, match=message):
        roll(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_an_adapter_that_was_trained_further_is_another_setting(tmp_path):
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    roll(tmp_path, model=model)
    models.randomize_adapter(model)
    with pytest.raises(OrdMoEConfigError, match="router_and_adapter_sha256"):
        roll(tmp_path, model=model)


def test_settings_without_rows_bind_nobody(tmp_path):
    with pytest.raises(ValueError, match="temperature"):
        roll(tmp_path, temperature=-1.0)
    assert contents(tmp_path).keys() == {"rollout_settings.json"}
    roll(tmp_path)
    assert json.loads((tmp_path / "rollout_settings.json").read_text())["generation"]["temperature"] == 1.5


def test_a_folder_of_something_else_is_refused(tmp_path):
    text.conversations(2).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(OrdMoEConfigError, match="holds train.parquet but no rollout_settings.json"):
        roll(tmp_path)
    assert contents(tmp_path).keys() == {"train.parquet"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": text.conversations(2).remove_columns("prompt")}, OrdMoEDataError, "no column 'prompt'"),
        ({"dataset": text.conversations(2).select([])}, OrdMoEDataError, "no samples"),
        ({"keep_columns": ["color"]}, OrdMoEDataError, "'color', which is not a column"),
        (
            {"dataset": text.conversations(2).rename_column("kind", "tiers"), "keep_columns": ["tiers"]},
            OrdMoEDataError,
            "a name that rollouts use",
        ),
        ({"tiers": [1, 4]}, OrdMoEConfigError, "from 1 .* to num_tiers=3"),
        ({"tiers": [3, 1]}, OrdMoEConfigError, r"must rise, each named once, got \[3, 1\]"),
        ({"num_tiers": 5}, OrdMoEConfigError, "num_tiers=5 does not fit"),
        ({"scored_by": "judge"}, OrdMoEConfigError, "got 'judge'"),
        ({"batch_size": 0}, OrdMoEConfigError, "batch_size must be at least 1, got 0"),
        ({"generation_batch_size": 0}, OrdMoEConfigError, "generation_batch_size must be at least 1"),
        ({"num_return_sequences": 2}, OrdMoEConfigError, "num_return_sequences=2"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        roll(tmp_path, **changes)
    assert not contents(tmp_path)


def test_columns_and_tiers_that_were_asked_for(tmp_path):
    model = models.qwen3_moe().train()
    dataset = text.conversations(3).add_column("note", ["a", "b", "c"])
    rollouts = roll(tmp_path, dataset, model, keep_columns=["kind"], tiers=[1, 3])
    assert set(rollouts.column_names) == {"prompt", "completion", "kind", *ROLLOUT_FEATURES}
    assert rollouts["tiers"][:] == [[1, 3]] * 3
    assert rollouts["completion"][:] == dataset["completion"][:]
    assert all(len(row[name]) == 2 for row in rollouts for name in ROLLOUT_FEATURES)
    assert model.training
