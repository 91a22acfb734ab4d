import pytest
from peft import LoraConfig, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.cli.arguments import ModelArguments, SampleArguments
from ordmoe_peft.cli.model_checks import check_adapter_fits, check_is_somewhere, check_subject, read_adapter
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models


@pytest.fixture
def base(tmp_path) -> ModelArguments:
    """A base of which there is the configuration alone: nothing else is to be read."""
    models.qwen3_moe().config.save_pretrained(tmp_path / "base")
    return ModelArguments(model_name_or_path=str(tmp_path / "base"))


def test_what_fits_passes_without_weights(base, tmp_path):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, num_tiers=4)).save_pretrained(tmp_path / "adapter")
    check_subject(base, SampleArguments())
    check_subject(base, SampleArguments(adapter=str(tmp_path / "adapter")))
    check_adapter_fits(base, OrdMoEConfig(r=4, targets=["router", "experts", "attention"]), False)


def test_tiers_are_those_of_the_adapter_unless_others_are_asked_for(base, tmp_path):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, num_tiers=2)).save_pretrained(tmp_path / "adapter")
    options = SampleArguments(adapter=str(tmp_path / "adapter"))
    options.tiers = [3]
    with pytest.raises(OrdMoEConfigError, match="num_tiers=2, got"):
        check_subject(base, options)
    options.num_tiers = 5
    with pytest.raises(OrdMoEConfigError, match="num_tiers=5 does not fit"):
        check_subject(base, options)


def test_an_adapter_that_does_not_fit(base):
    with pytest.raises(OrdMoEModelError, match="has nothing of that role"):
        check_adapter_fits(base, OrdMoEConfig(targets=["shared_experts"]), False)


def test_an_adapter_of_pefts_is_left_to_it(tmp_path):
    get_peft_model(models.qwen3_dense(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert read_adapter(str(tmp_path)) is None


def test_an_adapter_of_pefts_does_not_go_on_packed_experts(base, tmp_path):
    get_peft_model(models.qwen3_dense(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    base.load_in_4bit = True
    with pytest.raises(OrdMoEConfigError, match="plain adapter of PEFT's.*leave load_in_4bit out"):
        check_subject(base, SampleArguments(adapter=str(tmp_path / "plain")))


def test_an_adapter_in_place_of_a_model_is_named(base, tmp_path):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(tmp_path / "adapter")
    base.model_name_or_path = str(tmp_path / "adapter")
    with pytest.raises(OrdMoEModelError, match="It holds an adapter: give its base as MODEL, and --adapter"):
        check_subject(base, SampleArguments())


def test_the_base_of_an_adapter_is_a_folder_or_an_id(tmp_path):
    check_is_somewhere("owner/name", "adapter")
    check_is_somewhere(str(tmp_path), "adapter")
    with pytest.raises(OrdMoEModelError, match="The base of adapter, '/no/base', is no folder here and no id"):
        check_is_somewhere("/no/base", "adapter")
