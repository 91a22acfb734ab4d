"""The README's Python snippets run as they stand, on the shipped base in place of the 30B."""

import re
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.easy_vqa.data import load_easy_vqa
from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.data.samples import prompt_inputs


ROOT = Path.cwd()
BASE = str(ROOT / "examples/easy_vqa/base")
# What the snippet leaves to a machine with a GPU, and to a longer run.
CHANGES = {
    '"Qwen/Qwen3-VL-30B-A3B-Instruct"': repr(BASE),
    'OrdMoETrainingArguments("my-adapter", erl_coef=0.01)': 'OrdMoETrainingArguments("my-adapter", erl_coef=0.01, '
    'bf16=False, use_cpu=True, report_to="none", max_steps=1, max_length=None)',
}


def test_snippets(tmp_path, monkeypatch):
    train, load, quantise = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for text, replacement in CHANGES.items():
        assert text in train
        train = train.replace(text, replacement)
    dataset = load_easy_vqa()["train"].select(range(4))
    exec(train, {"dataset": dataset})
    assert Path("my-adapter/adapter_model.safetensors").is_file()
    inputs = prompt_inputs(list(dataset), AutoProcessor.from_pretrained(BASE))
    for name in ("examples/easy_vqa/base", "adapters/easy-vqa-ordmoe"):
        assert f'"{name}"' in load
        load = load.replace(name, str(ROOT / name))
    exec(load, {"inputs": inputs})
    model = AutoModelForImageTextToText.from_pretrained(BASE, quantization_config=MoeBitsAndBytesConfig())
    exec(quantise, {"model": model, "dense": AutoModelForImageTextToText.from_pretrained(BASE)})
    assert AutoModelForImageTextToText.from_pretrained("my-4-bit-model").is_quantized
