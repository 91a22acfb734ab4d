import pytest

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.errors import OrdMoEConfigError


def test_defaults_to_nf4():
    assert MoeBitsAndBytesConfig().bnb_4bit_quant_type == "nf4"


@pytest.mark.parametrize(
    "arguments", [{"load_in_4bit": False}, {"load_in_8bit": True}, {"bnb_4bit_quant_type": "int4"}]
)
def test_what_is_not_4_bits_is_refused(arguments):
    with pytest.raises(OrdMoEConfigError, match="4"):
        MoeBitsAndBytesConfig(**arguments)
