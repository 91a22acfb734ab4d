"""The text-only example: its questions, the builder of its base, and its recipe on such a base."""

import json

import pytest
from reasoning_gym import create_dataset
from transformers import AutoModelForCausalLM, AutoProcessor, Qwen3MoeForCausalLM

from examples.reasoning.data import SIZES, TASKS, load_reasoning, question_key, write_parquet
from examples.reasoning.make_base import build_tokenizer, common_phrases, make_base
from ordmoe import main


@pytest.fixture(scope="module")
def splits():
    return load_reasoning({"train": 60, "validation": 20, "test": 20})


@pytest.fixture(scope="module")
def base(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(splits, folder, most_steps=2)
    return folder


def test_each_split_holds_as_many_questions_of_each_kind(splits):
    for split, number in (("train", 60), ("validation", 20), ("test", 20)):
        assert [splits[split]["kind"].count(kind) for kind in TASKS] == [number] * 3
    sample = splits["test"][0]
    assert [message["role"] for message in sample["prompt"] + sample["completion"]] == ["user", "assistant"]


def test_no_question_comes_twice_in_the_full_data():
    splits = load_reasoning()
    keys = [question_key(row["kind"], row["prompt"][0]["content"]) for split in splits.values() for row in split]
    assert len(keys) == len(TASKS) * sum(SIZES.values())
    assert len(set(keys)) == len(keys)
    seeds = {name: set(split["seed"]) for name, split in splits.items()}
    assert not seeds["train"] & seeds["validation"]
    assert not seeds["test"] & (seeds["train"] | seeds["validation"])


def test_swapped_numbers_make_the_same_question_and_another_sign_makes_another():
    assert question_key("chain_sum", "12 + 34 =") == question_key("chain_sum", "34 + 12 =")
    assert question_key("gcd", "of 12, 34. Give") == question_key("gcd", "of 34, 12. Give")
    assert question_key("chain_sum", "12 + 34 =") != question_key("chain_sum", "12 - 34 =")
    assert question_key("chain_sum", "12 + 34 =") != question_key("gcd", "12 + 34 =")


def test_reasoning_gym_scores_each_answer_as_right(splits):
    for row in splits["test"]:
        task = create_dataset(row["kind"], seed=row["seed"], size=1, **TASKS[row["kind"]])
        assert task[0]["question"] == row["prompt"][0]["content"]
        answer = row["completion"][0]["content"]
        assert task.score_answer(answer, task[0]) == 1.0
        assert task.score_answer("7" + answer, task[0]) < 1.0


def test_parquet_gives_the_rows_back(splits, tmp_path):
    write_parquet(splits, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["test.parquet", "train.parquet", "validation.parquet"]
    assert type(splits["test"]).from_parquet(str(tmp_path / "test.parquet")).to_list() == splits["test"].to_list()


def test_common_phrases_are_what_all_questions_begin_and_end_with():
    assert common_phrases(["Add: 12 =", "Add: 34 =", "Add: 5 ="]) == {"Add: ", " ="}
    assert common_phrases(["Spell: abc", "Spell: dog"]) == {"Spell: "}


def test_tokenizer_keeps_characters_apart_and_phrases_together(splits):
    tokenizer = build_tokenizer(splits["train"])
    question = splits["train"][0]["prompt"][0]["content"]
    phrase = "State the final answer to the following arithmetic problem: "
    problem = question.removeprefix(phrase).removesuffix(" =")
    assert tokenizer.tokenize(question) == [phrase, *problem, " ="]
    assert tokenizer.decode(tokenizer(question).input_ids) == question
    dialogue = splits["train"][0]["prompt"] + [{"role": "assistant", "content": "7"}]
    ids = tokenizer.apply_chat_template(dialogue)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["<|assistant|>", "7", tokenizer.eos_token]


def test_the_base_loads_from_its_folder(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert type(model) is Qwen3MoeForCausalLM
    assert not model.config.output_router_logits
    tokenizer = AutoProcessor.from_pretrained(base)
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    record = json.loads((base / "training_record.json").read_text())
    assert record["steps"] == 2
    assert record["validation_accuracy"].keys() == {*TASKS, "overall"}


def test_recipe_trains_and_evaluates_the_base(base, splits, tmp_path):
    write_parquet(splits, tmp_path / "data")
    shared = ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "data")]
    options = ["--output_dir", str(tmp_path / "adapter"), "--max_steps", "2", "--per_device_train_batch_size", "4"]
    assert main(["train", "--config", "examples/recipes/reasoning.yaml", *shared, *options, "--use_cpu", "true"]) == 0
    options = ["--adapter", str(tmp_path / "adapter"), "--limit", "6", "--tiers", "1", "2", "3", "--group_by", "kind"]
    results = tmp_path / "results.json"
    assert main(["evaluate", *shared, *options, "--max_new_tokens", "3", "--output_file", str(results)]) == 0
    assert [result["tier"] for result in json.loads(results.read_text())] == [1, 2, 3]
