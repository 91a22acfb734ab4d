"""What users get wrong, command by command: exit code 2, a line that names it, nothing written or loaded.

Files that only loading finds to be broken are in `test_loading.py`, errors of other libraries in `test_errors.py`.
"""

import json
import shlex
import shutil

import pytest
from peft import get_peft_model
from transformers import PreTrainedModel

from ordmoe import main
from ordmoe_peft import OrdMoEConfig
from tests import models, text


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with what is whole and what is not, which the commands below name as `{there}`."""
    folder = tmp_path_factory.mktemp("there")
    base = models.qwen3_moe()
    base.save_pretrained(folder / "base")
    text.tokenizer().save_pretrained(folder / "base")
    get_peft_model(base, OrdMoEConfig(r=4)).save_pretrained(folder / "adapter")
    get_peft_model(models.qwen3_moe(hidden_size=128), OrdMoEConfig(r=4)).save_pretrained(folder / "wider")
    models.qwen3_dense().config.save_pretrained(folder / "dense")
    for name, content in (("cut", '{"model_type": "qwen3_moe", '), ("unknown", '{"model_type": "nosuch"}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    (folder / "empty").mkdir()
    (folder / "file").write_text("text\n")
    spoil(folder, "no json", "adapter_config.json", "{no")
    spoil(folder, "foreign", "adapter_config.json", json.dumps({"peft_type": "NOSUCH"}))
    spoil(folder, "pointer", "adapter_model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    data = text.conversations()
    (folder / "data").mkdir()
    for split in ("train", "test"):
        data.to_json(folder / "data" / f"{split}.jsonl")
    (folder / "questions").mkdir()
    (folder / "questions" / "train.jsonl").write_text('{"question": "w1"}\n')
    recipes = {"list": "- a\n", "broken": "a: [1\nb: c: d\n", "empty": "", "typo": "lerning_rate: 1\n"}
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe")
    return folder


def spoil(folder, name, file, content):
    shutil.copytree(folder / "adapter", folder / name)
    (folder / name / file).write_text(content)


def _refuse(*args, **kwargs):
    raise AssertionError("a model is loaded")


DATA = "--dataset_name {there}/data"
EVALUATE = f"evaluate {{there}}/base {DATA}"
TRAIN = f"train {{there}}/base {DATA} --output_dir {{out}} --bf16 false --use_cpu true --report_to none"


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        # MODEL
        (f"evaluate {{there}}/nothing {DATA}", ["no folder '{there}/nothing'"]),
        (f"inspect ./nothing {DATA}", ["no folder './nothing'"]),
        (f"tiers {{there}}/empty {DATA}", ["{there}/empty", "no config.json"]),
        (f"evaluate {{there}}/cut {DATA}", ["{there}/cut", "not a valid JSON"]),
        (f"evaluate {{there}}/unknown {DATA}", ["{there}/unknown", "nosuch"]),
        (f"rollouts {{there}}/file {DATA} --output_dir {{out}}", ["{there}/file"]),
        (f"evaluate {{there}}/dense {DATA}", ["has no MoE layers"]),
        (TRAIN.replace("/base", "/dense"), ["has no MoE layers"]),
        ("plan {there}/empty", ["{there}/empty", "no config.json"]),
        ("families {there}/nothing", ["no folder '{there}/nothing'"]),
        # places to write to
        (TRAIN.replace("{out}", "{there}/file"), ["--output_dir {there}/file is a file"]),
        (TRAIN.replace("{out}", "{there}/file/x"), ["{there}/file is a file"]),
        (f"{EVALUATE} --output_file {{there}}/data", ["--output_file {there}/data is a folder"]),
        (f"{EVALUATE} --output_file {{there}}/file/x.json", ["{there}/file is a file"]),
        (f"{EVALUATE.replace('evaluate', 'tiers')} --report {{there}}/file", ["--report {there}/file is a file"]),
        ("merge {there}/adapter --output_dir {there}/data", ["{there}/data exists already"]),
        ("merge {there}/adapter --output_dir {there}/file/x", ["{there}/file is a file"]),
        ("export {there}/adapter --output_dir {there}/data", ["{there}/data holds"]),
        ("import {there}/adapter {there}/base --output_dir {there}/file", ["{there}/file is a file"]),
        # adapters
        (f"{EVALUATE} --adapter {{there}}/nothing", ["no folder {there}/nothing"]),
        (f"{EVALUATE} --adapter {{there}}/base", ["{there}/base is not a saved adapter"]),
        (f"{EVALUATE} --adapter '{{there}}/no json'", ["{there}/no json/adapter_config.json is no JSON"]),
        (f"{EVALUATE} --adapter {{there}}/foreign", ["adapter of type NOSUCH"]),
        (f"{EVALUATE} --adapter {{there}}/pointer", ["adapter_model.safetensors cannot be read"]),
        (f"{EVALUATE} --adapter {{there}}/wider", ["made for another base", "hidden_size 128"]),
        ("verify {there}/pointer {there}/base", ["adapter_model.safetensors cannot be read"]),
        ("verify {there}/adapter {there}/nothing", ["{there}/nothing"]),
        # data
        (TRAIN.replace("/data", "/nothing"), ["{there}/nothing"]),
        (TRAIN.replace("/data", "/questions"), ["['question']", "none of which holds an answer"]),
        (f"{EVALUATE} --dataset_split nosuch", ["nosuch", "train"]),
        (f"{EVALUATE} --group_by colour", ["colour", "'kind'"]),
        # values
        (f"{EVALUATE} --limit -1", ["--limit must be at least 1, got -1"]),
        (f"{EVALUATE} --per_device_eval_batch_size 0", ["--per_device_eval_batch_size must be at least 1, got 0"]),
        (f"{EVALUATE} --num_tiers 99", ["--num_tiers 99 does not fit", "largest num_tiers that fits is 4"]),
        (f"{EVALUATE} --tiers 9", ["--num_tiers 3, got [9]"]),
        (f"{TRAIN} --num_tiers 99", ["--num_tiers 99 does not fit"]),
        (f"{TRAIN} --targets shared_experts", ["'shared_experts'", "nothing of that role"]),
        (f"{TRAIN} --lora_r abc", ["--lora_r", "'abc'"]),
        (f"{TRAIN} --lerning_rate 1e-4", ["unknown option --lerning_rate; did you mean --learning_rate?"]),
        (f"{TRAIN} --resume_from_checkpoint {{out}}/checkpoint-3", ["{out}/checkpoint-3"]),
        (
            f"{TRAIN} --resume_from_checkpoint true",
            ["--resume_from_checkpoint true", "no complete checkpoint in {out}"],
        ),
        (f"{EVALUATE} --offload_experts", ["--offload_experts true", "--load_in_4bit true"]),
        ("plan Qwen3-30B-A3B --gpu_memory_gb 24 48 --usable_gb 20", ["--usable_gb 20.0", "2 sizes"]),
        # recipes
        (f"{TRAIN} --config {{there}}/nothing.yaml", ["{there}/nothing.yaml", "o such file"]),
        (f"{TRAIN} --config {{there}}/broken.yaml", ["{there}/broken.yaml is no YAML in line 2"]),
        (f"{TRAIN} --config {{there}}/list.yaml", ["{there}/list.yaml holds a value of type list"]),
        (f"{TRAIN} --config {{there}}/empty.yaml", ["{there}/empty.yaml is empty"]),
        (f"{TRAIN} --config {{there}}/binary.yaml", ["{there}/binary.yaml", "UTF-8"]),
        (f"{TRAIN} --config {{there}}/typo.yaml", ["lerning_rate", "did you mean --learning_rate?"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_line_names_what_is_wrong(command, parts, there, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", _refuse)
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    places = {"there": str(there), "out": str(tmp_path / "out")}
    try:
        code = main([part.format(**places) for part in shlex.split(command)])
    except SystemExit as end:  # argparse's
        code = end.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len([line for line in lines if "error: " in line]) == 1
    assert "Traceback (most" not in "".join(lines)
    for part in parts:
        assert part.format(**places) in lines[-1]
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
