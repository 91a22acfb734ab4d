"""The card's text and what the hub reads of it, for adapters of all kinds and names of all characters."""

import math
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.card import BEGIN, END, adapter_card


IN_4_BITS = {
    "quant_method": "ordmoe_peft",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": ["lm_head"],
}
TRAINING = {
    "objective": {"objective": "erl", "erl_coef": 0.01},
    "settings": {"batch_size": 64, "learning_rate": 1e-3},
    "data": {"id": "me/questions", "split": "train", "rows": 34_000, "columns": ["prompt", "completion"]},
    "figures": {"steps": 100, "tokens": 233_744, "mean_loss": None},
    "curves": [
        {"step": 10, "loss": 0.06, "tier_1/log_likelihood": -0.07, "tier_3/log_likelihood": -0.6},
        {"step": 100, "loss": -0.11, "tier_1/log_likelihood": -0.05, "tier_3/log_likelihood": -13.19},
    ],
    "evaluations": [
        {"of": "base", "data": "questions", "metrics": {"accuracy": 0.918, "tier_1/log_likelihood": -0.06}},
        {"of": "adapter", "data": "questions", "metrics": {"accuracy": 0.927, "tier_1/log_likelihood": -0.05}},
    ],
}
RECORD = {
    "versions": {"peft": "0.21.2"},
    "base": {"id": "Qwen/Qwen3-30B-A3B", "revision": "abc123", "class": "Qwen3MoeForCausalLM"},
    "training": TRAINING,
}


def card_of(tmp_path, record, **settings) -> ModelCard:
    """The card as the hub's own classes read it from a file."""
    name = settings.pop("base_model_name_or_path", None)
    config = OrdMoEConfig(**settings)
    config.base_model_name_or_path = name
    adapter_card(config, record).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def tables(card: ModelCard) -> list[list[list[str]]]:
    """The cells of each table, split at pipes that no backslash stands before."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", card.text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()] for block in blocks]


def code(card: ModelCard, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)


def test_what_the_hub_reads(tmp_path):
    card = card_of(tmp_path, RECORD | {"base": RECORD["base"] | {"license": {"license": "apache-2.0"}}})
    data = card.data
    assert data.tags == ["peft", "ordmoe", "mixture-of-experts", "base_model:adapter:Qwen/Qwen3-30B-A3B"]
    assert (data.base_model, data.library_name) == ("Qwen/Qwen3-30B-A3B", "peft")
    assert (data.license, data.pipeline_tag, data.datasets) == ("apache-2.0", "text-generation", ["me/questions"])
    [result] = data.eval_results  # of the adapter, not of the base
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.927)
    assert (result.dataset_name, result.task_type) == ("questions", "text-generation")
    # What is read and written again is the same.
    assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict() == data.to_dict()


def test_what_people_read(tmp_path):
    card = card_of(tmp_path, RECORD, r=8)
    about, results, curves = tables(card)
    cells = {row[0].strip(): row[1].strip() for row in about}
    assert cells["base"] == "`Qwen/Qwen3-30B-A3B`, revision `abc123`, `Qwen3MoeForCausalLM`"
    assert cells["its weights in training"] == "not quantised"
    assert "r 8" in cells["LoRA"]
    assert "num tiers 3, grouping `uniform`" in cells["tiers"]
    assert cells["objective"] == "objective `erl`, erl coef 0.01"
    assert cells["data"] == "id `me/questions`, split `train`, rows 34,000, columns `prompt`, `completion`"
    assert cells["run"] == "steps 100, tokens 233,744"
    assert [cell.strip() for cell in results[0][2:]] == ["exact match", "tier 1"]
    assert [row[2].strip() for row in results[2:]] == ["91.8 %", "92.7 %"]
    assert [cell.strip() for cell in curves[0]] == ["step", "`loss`", "tier 1", "tier 3"]
    assert [row[3].strip() for row in curves[2:]] == ["-0.6", "-13.19"]


def test_snippets_are_code(tmp_path):
    record = RECORD | {"base": RECORD["base"] | {"quantization": IN_4_BITS, "config": {"dtype": "bfloat16"}}}
    card = card_of(tmp_path, record | {"probes": {"token_ids": [[1]]}})
    loading, plain = code(card)
    for snippet in (loading, plain):
        compile(snippet, "README.md", "exec")
    assert 'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"' in loading
    assert '.from_pretrained(\n    "Qwen/Qwen3-30B-A3B", dtype="bfloat16", quantization_config=' in loading
    assert 'AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")\n' in plain
    assert "on the dense base, where likelihoods are somewhat other" in card.text
    assert "tier_routing" in loading
    verify, export = code(card, "bash")
    assert verify == "ordmoe verify ADAPTER Qwen/Qwen3-30B-A3B\n"
    assert export.startswith("ordmoe export ADAPTER")
    assert "`KeyError: 'ORDMOE'`" in card.text
    assert "ordmoe verify" not in card_of(tmp_path, record).text  # without probes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("/home/me/models/my-base", "my-base"), ("../my-base/", "my-base"), (r"C:\models\my-base", "my-base"), ("", None)],
)
def test_a_base_without_an_id_is_named_by_its_folder(tmp_path, name, expected):
    record = {"base": {"id": None, "class": "Qwen3VLMoeForConditionalGeneration"}}
    card = card_of(tmp_path, record, base_model_name_or_path=name)
    assert f"# OrdMoE adapter of `{expected or 'Qwen3VLMoeForConditionalGeneration'}`" in card.text
    assert "models" not in str(card)
    assert "`BASE` is the folder of the base, which is on no hub (`" in card.text
    assert '.from_pretrained("BASE")' in code(card)[0]
    assert card.data.base_model is None
    assert not any("base_model" in tag for tag in card.data.tags)
    assert card.data.pipeline_tag == "image-text-to-text"


def test_without_a_run_and_with_one_tier(tmp_path):
    card = card_of(tmp_path, {"base": {"id": "a/b", "class": "MyOwnModel"}, "training": None}, num_tiers=1)
    assert "How it was trained is not recorded." in card.text
    assert not any(words in card.text for words in ("supervised", "arXiv", "tier_routing", "in training"))
    trained = card_of(tmp_path, {"base": {"id": "a/b"}, "training": {"figures": {"steps": 3}}}, num_tiers=1)
    assert "trained by supervised fine-tuning" in trained.text and "arXiv" not in trained.text
    assert len(tables(card)) == 1
    assert "None" not in str(card)
    assert card.data.pipeline_tag is None
    assert card.data.license is None


HOSTILE = [
    'it\'s "quoted": yes',
    "a | b",
    "<script>alert(1)</script>",
    "two\nlines\n---\n# heading",
    f"over\n{END}\n{BEGIN}",
    "`code`",
    "```\n```",
    "- {a: [1, 2]} # no",
    "日本 \ud800",
    "{base} {code}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_text_whatever_is_in_them(tmp_path, text):
    usual = card_of(tmp_path, RECORD)
    training = TRAINING | {
        "data": {"id": text, "name": text, "split": text, "rows": 8, "columns": [text]},
        "objective": {text: text},
        "curves": [{"step": 1, text: 1.0}],
        "evaluations": [{"of": "adapter", "data": text, "split": text, "metrics": {"accuracy": 0.5, text: 1.0}}],
    }
    base = {"id": text, "revision": text, "class": text}
    card = card_of(tmp_path, {"versions": {text: text}, "base": base, "training": training})
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    assert card.data.base_model is card.data.datasets is None  # no id of the hub, which would refuse the card
    assert card.data.eval_results[0].dataset_name == line
    # Nothing of it is a heading, a table's cell, a fence, HTML or one of our two comments.
    headings = re.findall(r"^#+ .*$", usual.text, re.MULTILINE)
    assert re.findall(r"^#+ .*$", card.text, re.MULTILINE)[1:] == headings[1:]
    for table in tables(card):
        assert len({len(row) for row in table}) == 1
    assert [card.text.splitlines().count(mark) for mark in (BEGIN, END)] == [1, 1]
    outside = re.sub(r"^```.*?^```$", "", card.text, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", outside)
    assert len(code(card)) == 2
    compile(code(card)[0], "README.md", "exec")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_figures_that_are_no_numbers(tmp_path, value):
    training = {
        "figures": {"steps": 3, "mean_loss": value},
        "curves": [{"step": 1, "loss": value}],
        "evaluations": [{"of": "adapter", "metrics": {"accuracy": value, "loss": 1.0}}],
    }
    card = card_of(tmp_path, RECORD | {"training": training})
    assert card.data.eval_results is None
    assert not re.search(r"\b(nan|inf)\b", str(card))
    assert [cell.strip() for cell in tables(card)[-1][2]] == ["1", "—"]


@pytest.mark.parametrize(
    "junk", ["text", 3, [1, "a"], {"a": {"b": [1]}}, [{"metrics": 1}, {"metrics": {"accuracy": "x"}}]]
)
def test_a_record_that_others_wrote_is_no_obstacle(tmp_path, junk):
    """An adapter that was loaded is saved whatever its record says of its training."""
    for part in (*TRAINING, "training", "base"):
        record = RECORD | {part: junk} if part in RECORD else RECORD | {"training": TRAINING | {part: junk}}
        assert "# OrdMoE adapter of" in card_of(tmp_path, record).text
    assert "`text`" in card_of(tmp_path, RECORD | {"training": {"data": "text"}}).text
