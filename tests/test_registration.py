"""What upstream's registries know once the package is imported."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, OrdMoEModel
from ordmoe_peft.moe_model import EXPERTS_IMPLEMENTATION
from ordmoe_peft.quantization.config import QUANT_METHOD
from ordmoe_peft.registration import register


def registered() -> tuple:
    return (
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ORDMOE],
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ORDMOE],
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD],
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD],
        ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION],
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
    )


def test_peft_and_transformers_know_the_method():
    assert registered()[:3] == (OrdMoEConfig, OrdMoEModel, MoeBitsAndBytesConfig)


def test_registering_twice_changes_nothing():
    before = registered()
    register()
    assert registered() == before
    assert [name for name in PeftType.__members__ if name == "ORDMOE"] == ["ORDMOE"]
