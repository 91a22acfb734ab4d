"""What users of LoRA know PEFT and transformers to do with adapters: it works on OrdMoE's, or is refused by name."""

import pytest
import torch
import transformers
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models
from tests.adapter.test_model import EVERYTHING, adapted, logits
from tests.families.rows import installed_rows
from tests.families.subject import Subject


BATCH = models.text_batch()
LINEAR = ["attention"]


def close(got, wanted) -> bool:
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def with_adapters(**targets: list[str]) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model with adapters by these names, the first of them active, and the logits of each; `""` is the base."""
    model = models.qwen3_moe()
    wanted = {"": logits(model, BATCH)}
    for number, (name, roles) in enumerate(targets.items()):
        config = OrdMoEConfig(r=6 - number, lora_alpha=4 + number, targets=roles)
        tuned = model.add_adapter(name, config) or model if number else get_peft_model(model, config, name)
        model = tuned.eval()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name and f".{name}." in parameter_name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for name in reversed(targets):
        model.set_adapter(name)
        wanted[name] = logits(model, BATCH)
    others = list(wanted.values())
    assert not any(close(one, other) for i, one in enumerate(others) for other in others[:i])
    return model, wanted


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_weighted_adapters_are_those_of_peft(kind, tmp_path):
    model, _ = with_adapters(one=LINEAR, two=LINEAR)
    plain = models.qwen3_moe()
    for name, config in model.peft_config.items():
        settings = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
        plain = plain.add_adapter(name, settings) or plain if name == "two" else get_peft_model(plain, settings, name)
    plain.load_state_dict(model.state_dict())
    options = {"combination_type": kind} | ({"density": 0.5} if kind == "ties" else {})
    if kind in ("linear", "ties"):  # which need equal ranks
        with pytest.raises(ValueError, match="same r value"):
            model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", **options)
        options["combination_type"] += "_svd" if kind == "ties" else ""
        names = ["one", "two"] if kind == "ties" else ["one", "one"]
    else:
        names = ["one", "two"]
    for tuned in (model, plain.eval()):
        torch.manual_seed(0)
        tuned.add_weighted_adapter(names, [0.7, 0.4], "both", **options)
        tuned.set_adapter("both")
    wanted = logits(model, BATCH)
    assert close(wanted, logits(plain, BATCH))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "both").eval()
    assert close(logits(loaded, BATCH), wanted)


def test_weighted_adapters_on_parameters_are_refused():
    model, wanted = with_adapters(one=EVERYTHING, two=EVERYTHING)
    with pytest.raises(ValueError, match="does not support targeting nn.Parameter"):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type="cat")
    assert list(model.peft_config) == ["one", "two"]
    assert close(logits(model, BATCH), wanted["one"])


def test_three_adapters_by_name(tmp_path):
    model, wanted = with_adapters(default=EVERYTHING, two=EVERYTHING, three=LINEAR)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path, low_cpu_mem_usage=True)
    for name in ("two", "three"):
        loaded.load_adapter(tmp_path / name, name)
    assert close(logits(loaded.eval(), BATCH), wanted["default"])
    for name in ("two", "three", "default", "two"):
        loaded.set_adapter(name)
        assert close(logits(loaded, BATCH), wanted[name])
    for name in ("three", "default"):
        loaded.delete_adapter(name)
        assert close(logits(loaded, BATCH), wanted["two"])
    assert not any(".three." in name or ".default." in name for name, _ in loaded.named_parameters())


def test_two_adapters_at_once_are_their_sum():
    model, wanted = with_adapters(one=EVERYTHING, two=EVERYTHING)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, BATCH)
    model.merge_adapter(["two"])
    model.unmerge_adapter()
    assert close(logits(model, BATCH), both)
    model.base_model.set_adapter("one")
    assert close(logits(model, BATCH), wanted["one"])
    model.base_model.set_adapter(["one", "two"])
    assert close(logits(model.merge_and_unload(), BATCH), both)


def test_an_adapter_for_each_row():
    rows = ["one", "two", "__base__"]
    model, wanted = with_adapters(one=LINEAR, two=LINEAR)
    with torch.no_grad():
        mixed = model(**BATCH, adapter_names=rows).logits
    for row, name in enumerate(["one", "two", ""]):
        assert close(mixed[row], wanted[name][row])
    model, wanted = with_adapters(one=EVERYTHING, two=LINEAR)
    with pytest.raises(OrdMoEModelError, match="gives each row of a batch an adapter"):
        model(**BATCH, adapter_names=rows)
    with pytest.raises(OrdMoEModelError, match="gives each row of a batch an adapter"):
        model.generate(**BATCH, adapter_names=rows)
    assert close(logits(model, BATCH), wanted["one"])


def test_modules_to_save_come_back(tmp_path):
    model = adapted(models.qwen3_moe(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path).eval()
    assert close(logits(loaded, BATCH), logits(model, BATCH))


@pytest.mark.parametrize("name", ["lora_A", "my.adapter", "keys", ""])
def test_names_that_peft_would_mistake_are_refused(name):
    model, wanted = with_adapters(one=EVERYTHING)
    with pytest.raises(OrdMoEConfigError, match=f"adapter's name '{name}'"):
        model.add_adapter(name, OrdMoEConfig())
    assert list(model.peft_config) == ["one"]
    assert close(logits(model, BATCH), wanted["one"])


def test_mixed_models_are_refused(tmp_path):
    adapted(models.qwen3_moe()).save_pretrained(tmp_path)
    model = models.qwen3_moe()
    with pytest.raises(ValueError, match="'ORDMOE' is not compatible with the `PeftMixedModel`"):
        get_peft_model(model, OrdMoEConfig(), mixed=True)
    with pytest.raises(ValueError, match="ORDMOE is not supported for mixed models"):
        PeftMixedModel.from_pretrained(model, tmp_path)
    assert not any("lora_" in name for name, _ in model.named_parameters())


class TestWithoutNamingTheBase:
    """What finds the base by the adapter's own configuration."""

    @pytest.fixture
    def folder(self, tmp_path):
        models.qwen3_moe().save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        tuned = adapted(base)
        tuned.save_pretrained(tmp_path / "adapter")
        torch.save(logits(tuned, BATCH), tmp_path / "wanted.pt")
        return tmp_path

    @pytest.mark.parametrize("auto_class", [AutoPeftModelForCausalLM, AutoPeftModel, transformers.AutoModelForCausalLM])
    def test_auto_classes(self, folder, auto_class):
        loaded = auto_class.from_pretrained(folder / "adapter").eval()
        assert close(logits(loaded, BATCH), torch.load(folder / "wanted.pt"))


class TestIntoTransformersModels:
    """transformers' own methods, which keep the model's class. All but `load_adapter` ask for PEFT 0.22 (5.24)."""

    def test_load_adapter(self, tmp_path, caplog, monkeypatch):
        tuned = adapted(models.qwen3_moe())
        tuned.save_pretrained(tmp_path)
        model = models.qwen3_moe()
        monkeypatch.setattr("ordmoe_peft.adapter.model.logger.propagate", True, raising=False)
        with caplog.at_level("WARNING"):
            model.load_adapter(str(tmp_path))
        assert "neither its weights nor its base are checked" in caplog.text
        assert type(model).__name__ == "Qwen3MoeForCausalLM"
        assert close(logits(model, BATCH), logits(tuned, BATCH))
        with tier_routing(model, 3), tier_routing(tuned, 3):
            assert close(logits(model, BATCH), logits(tuned, BATCH))

    def test_load_adapter_where_transformers_renames(self, tmp_path):
        """Laguna: the renaming of `mlp.shared_expert.` takes `mlp.shared_experts`, too."""
        (row,) = [row for row in installed_rows() if row.name == "LagunaForCausalLM"]
        subject = Subject(row)
        subject.adapted(targets=["shared_experts"]).save_pretrained(tmp_path)
        model = subject.copy()
        with pytest.raises(OrdMoEModelError, match=r"would read .*shared_experts.* as .*shared_experts\.\."):
            model.load_adapter(str(tmp_path))
        assert torch.equal(subject.logits(model), subject.plain)
        assert not any("lora_" in name for name, _ in model.named_parameters())

    def test_add_adapter(self):
        """Which asks PEFT for `inject_adapter_in_model`."""
        model = models.qwen3_moe()
        base = logits(model, BATCH)
        inject_adapter_in_model(OrdMoEConfig(r=6, lora_alpha=4, targets=EVERYTHING), model, "mine")
        assert close(logits(model, BATCH), base)
        models.randomize_adapter(model)
        assert not close(logits(model, BATCH), base)
        assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"mine"}


def test_pefts_hot_swap_is_refused(tmp_path):
    """Its padding would put zeros between experts; and it asks for the type LORA."""
    adapted(models.qwen3_moe(), seed=5).save_pretrained(tmp_path)
    model, wanted = with_adapters(default=EVERYTHING)
    with pytest.raises(ValueError, match="ORDMOE was passed"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    with pytest.raises(AttributeError):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert close(logits(model, BATCH), wanted["default"])
