"""LoRA on some experts: which the data use most, what is refused, and that nothing moves the others."""

import json
import logging
import re

import pytest
import torch
from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments, quantize_experts_
from ordmoe_peft.adapter.expert_selection import most_used_experts
from ordmoe_peft.adapter.targets import adapted_modules
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models, text
from tests.families import tiny
from tests.families.rows import installed_rows


CHOSEN = {0: [1, 5], 1: [], 2: [0, 2, 7]}
BATCH = models.text_batch()


def report(**uses: list[float]) -> dict:
    return {"layers": [{"layer": int(layer[1:]), "utilisation": use} for layer, use in uses.items()]}


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (0.8, [1, 3, 4]), (1, [0, 1, 3, 4]), (1e-9, [1])]
)
def test_the_fewest_experts_that_get_a_share_of_the_tokens(share, wanted, tmp_path):
    """The second expert has half of them, the fourth a quarter, the third none."""
    found = report(_0=[0.4, 2.0, 0.0, 1.0, 0.6], _1=[1.0])
    assert most_used_experts(found, share) == {"0": wanted, "1": [0]}
    (tmp_path / "inspect.json").write_text(json.dumps(found))
    assert most_used_experts(tmp_path / "inspect.json", share) == {"0": wanted, "1": [0]}


def test_a_report_of_another_base_is_warned_about(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    found = report(_0=[0.4, 2.0]) | {"model": "org/base"}
    for model in (None, "org/base", "/folder/base/"):
        assert most_used_experts(found, 0.5, model) == {"0": [1]}
    assert not caplog.messages
    most_used_experts(found, 0.5, "org/other")
    assert "is of 'org/base', and the experts that it chooses are trained in 'org/other'" in caplog.text


@pytest.mark.parametrize(
    ("content", "share", "message"),
    [
        (report(_0=[1.0]), 0, "expert_share must be above 0 and at most 1, got 0"),
        (report(_0=[1.0]), 1.5, "at most 1, got 1.5"),
        ({"layers": [{"layer": 0}]}, 0.5, "has no `utilisation` of experts by layer .* no report of `ordmoe inspect`"),
        ([1], 0.5, "inspect.json has no `utilisation`"),
        (report(_0=[float("nan")]), 0.5, "a use is negative or no number"),
        (None, 0.5, "expert_selection='.*inspect.json' cannot be read as JSON"),
    ],
)
def test_no_report_and_no_share(content, share, message, tmp_path):
    if content is not None:
        (tmp_path / "inspect.json").write_text(json.dumps(content))
    with pytest.raises(OrdMoEConfigError, match=message):
        most_used_experts(tmp_path / "inspect.json", share)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([1, 2], "expert_selection must be a mapping or None"),
        ({0: [1], "0": [2], 1: [], 2: []}, "names a layer twice"),
        ({"a": [1]}, "must have lists of experts by MoE layers.* got 'a'"),
        ({-1: [1]}, "got -1"),
        ({0: 3}, r"got 0: 3"),
        ({0: [1.0]}, r"got 0: \[1.0\]"),
        ({0: [True]}, r"got 0: \[True\]"),
        ({0: []}, "chooses no expert"),
        (CHOSEN | {3: [0]}, r"has the layers \[3\], and this model has the MoE layers 0 to 2"),
        ({0: [1]}, r"lacks the layers \[1, 2\]"),
        (CHOSEN | {1: [8]}, "has expert 8 in layer 1, whose experts are 0 to 7"),
        (CHOSEN | {1: [-1]}, "has expert -1 in layer 1"),
    ],
)
def test_what_is_no_selection_is_refused(selection, message):
    model = models.qwen3_moe()
    with pytest.raises(OrdMoEConfigError, match=message):
        get_peft_model(model, OrdMoEConfig(expert_selection=selection))
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_where_there_is_nothing_to_select_from():
    with pytest.raises(OrdMoEConfigError, match="expert_selection is for experts, which targets="):
        OrdMoEConfig(targets=["router"], expert_selection=CHOSEN)
    with pytest.raises(OrdMoEModelError, match=r"experts in stacks, and those of .* are modules of their own"):
        row = "SwitchTransformersForConditionalGeneration"
        get_peft_model(family(row), OrdMoEConfig(targets=["experts"], expert_selection={0: [1], 1: [0]}))


def family(name: str):
    row = next(row for row in installed_rows() if row.name == name)
    return tiny.tiny_model(row.model_class, tiny.tiny_config(row.config_class, row.changes))


def check_others_are_zero(model, chosen=CHOSEN) -> None:
    """Of the others A and B are exactly 0. A of the chosen is not, nor is B of those that have had tokens."""
    stacks = [(name, module) for name, module in adapted_modules(model) if "experts" in name]
    assert stacks
    for name, module in stacks:
        of_layer = chosen[int(re.search(r"layers\.(\d+)\.", name)[1])]
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        A_EX = A.view(module.num_experts, -1)
        B_EX = B.view(len(B), -1, module.num_experts).permute(2, 0, 1).flatten(1)
        for expert in range(module.num_experts):
            assert A_EX[expert].any() == (expert in of_layer) and not (B_EX[expert].any() and expert not in of_layer)
        assert B_EX.any() == bool(of_layer), name


OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.5),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
}
MODELS = {
    "dense": models.qwen3_moe,
    "4 bits": lambda: quantize_experts_(models.qwen3_moe()),
    "transposed": models.gpt_oss,
    "outside the interface": lambda: family("Llama4ForCausalLM"),
}


def steps(model, optimizer, number: int = 3) -> None:
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = OPTIMIZERS[optimizer](weights)
    for _ in range(number):
        for _ in range(2):  # gradients accumulate
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(("kind", "optimizer"), [*((kind, "AdamW") for kind in MODELS), ("dense", "SGD")])
def test_the_others_do_not_move(kind, optimizer, tmp_path):
    base = MODELS[kind]()
    tuned = get_peft_model(base, OrdMoEConfig(r=3, expert_selection=CHOSEN))
    steps(tuned, optimizer)
    check_others_are_zero(tuned)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[kind](), tmp_path, is_trainable=True)
    assert again.peft_config["default"].expert_selection == {str(layer): experts for layer, experts in CHOSEN.items()}
    steps(again, optimizer, 1)
    check_others_are_zero(again)


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
def test_the_trainer_and_merging_leave_the_others_alone(optimizer, tmp_path):
    model = models.qwen3_moe()
    before = [layer.mlp.experts.down_proj.detach().clone() for layer in model.model.layers]
    tuned = get_peft_model(model, OrdMoEConfig(r=16, expert_selection=CHOSEN))  # in 8 bits from 4096 numbers on
    settings = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.5,
        "learning_rate": 0.01,
    }
    args = OrdMoETrainingArguments(tmp_path, optim=optimizer, use_cpu=True, bf16=False, report_to="none", **settings)
    data = {"train_dataset": text.conversations(16), "processing_class": text.tokenizer()}
    OrdMoETrainer(tuned, args=args, **data).train()
    check_others_are_zero(tuned)
    for index, layer in enumerate(tuned.merge_and_unload().model.layers):
        for expert, matrix in enumerate(layer.mlp.experts.down_proj):
            assert torch.equal(matrix, before[index][expert]) == (expert not in CHOSEN[index]), (index, expert)


def test_weights_of_another_selection_are_refused(tmp_path):
    some = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, expert_selection=CHOSEN))
    some.save_pretrained(tmp_path / "some")
    assert "trained on 5 experts of 3 layers" in (tmp_path / "some" / "README.md").read_text()
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(tmp_path / "all")
    with pytest.raises(OrdMoEConfigError, match="saved with expert_selection=None; the adapter 'default'"):
        some.load_adapter(tmp_path / "all", "default")
    config = OrdMoEConfig.from_pretrained(tmp_path / "all")
    config.expert_selection = {str(layer): experts for layer, experts in CHOSEN.items()}
    with pytest.raises(OrdMoEConfigError, match="cannot be given to a saved adapter: .*all were trained with None"):
        PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "all", config=config)
