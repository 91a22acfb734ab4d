"""The one place that writes to upstream registries: the PEFT method, the experts function, the quantizer."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import auto
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

from ._compat import add_peft_type
from .adapter.config import PEFT_METHOD, OrdMoEConfig
from .adapter.model import OrdMoEModel
from .experts.forward import experts_forward
from .moe_model import EXPERTS_IMPLEMENTATION
from .quantization.config import QUANT_METHOD, MoeBitsAndBytesConfig
from .quantization.quantizer import MoeBnb4BitHfQuantizer


def register() -> None:
    """Make peft and transformers know OrdMoE; a second call does nothing."""
    if getattr(PeftType, PEFT_METHOD.upper(), None) not in PEFT_TYPE_TO_TUNER_MAPPING:
        add_peft_type(PEFT_METHOD.upper())
        register_peft_method(name=PEFT_METHOD, config_cls=OrdMoEConfig, model_cls=OrdMoEModel, prefix="lora_")
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MoeBitsAndBytesConfig)
        register_quantizer(QUANT_METHOD)(MoeBnb4BitHfQuantizer)
    # The classes whose `get_loading_attributes` count for a checkpoint that is quantised already; no function adds one.
    if MoeBitsAndBytesConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MoeBitsAndBytesConfig,)
