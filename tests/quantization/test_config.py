import pytest
import torch

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


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_block_size_survives_being_saved(blocksize):
    config = MoeBitsAndBytesConfig(bnb_4bit_blocksize=blocksize, bnb_4bit_use_double_quant=True)
    again = MoeBitsAndBytesConfig.from_dict(config.to_dict())
    assert again.bnb_4bit_blocksize == blocksize
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("blocksize", [32, 100, 8192, "64"])
def test_block_sizes_that_bitsandbytes_does_not_have_everywhere_are_refused(blocksize):
    with pytest.raises(OrdMoEConfigError, match=r"bnb_4bit_blocksize must be one of \(64,"):
        MoeBitsAndBytesConfig(bnb_4bit_blocksize=blocksize)


@pytest.mark.parametrize("dtype", ["int8", torch.float64])
def test_dtypes_that_weights_cannot_be_unpacked_to_are_refused(dtype):
    with pytest.raises(OrdMoEConfigError, match=r"bnb_4bit_compute_dtype must be one of .*torch\.(int8|float64)"):
        MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=dtype)
