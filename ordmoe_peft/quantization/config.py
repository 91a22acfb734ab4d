"""The configuration that `from_pretrained(quantization_config=…)` takes for 4-bit experts."""

from typing import Any

from transformers import BitsAndBytesConfig

from ..errors import OrdMoEConfigError


# The name of the package, for where it is not imported: transformers then names the method that it does not know.
QUANT_METHOD = "ordmoe_peft"


class MoeBitsAndBytesConfig(BitsAndBytesConfig):
    """[`~transformers.BitsAndBytesConfig`] that also quantises fused experts, where most of a MoE's weights are.

    With the stock class, `load_in_4bit` silently leaves fused experts in bf16. With this one, expert stacks and the
    linear layers of the decoder are packed in 4 bits, while routers, embeddings, heads, norms and the vision tower
    keep their dtype.

    Args:
        load_in_4bit (`bool`, defaults to `True`): must be `True`; 8-bit experts are not supported.
        bnb_4bit_quant_type (`str`, defaults to `"nf4"`): `"nf4"` or `"fp4"`.
        kwargs: all other arguments of [`~transformers.BitsAndBytesConfig`], e.g. `bnb_4bit_use_double_quant`,
            `bnb_4bit_compute_dtype`, `llm_int8_skip_modules`.

    Raises:
        [`OrdMoEConfigError`]: 4-bit loading is off, or the quantisation type is unknown.
    """

    def __init__(self, load_in_4bit: bool = True, bnb_4bit_quant_type: str = "nf4", **kwargs):
        if not load_in_4bit or kwargs.get("load_in_8bit"):
            raise OrdMoEConfigError(
                "MoeBitsAndBytesConfig quantises to 4 bits only: leave `load_in_4bit=True` and `load_in_8bit` unset."
            )
        if bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise OrdMoEConfigError(f"bnb_4bit_quant_type must be 'nf4' or 'fp4', got {bnb_4bit_quant_type!r}.")
        super().__init__(load_in_4bit=load_in_4bit, bnb_4bit_quant_type=bnb_4bit_quant_type, **kwargs)
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """All settings, as `config.json` has them.

        Without `load_in_4bit`, which is always on: transformers takes any dictionary with it for the stock class's,
        whatever its `quant_method` (`AutoQuantizationConfig.from_dict` in `transformers/quantizers/auto.py`).
        """
        return {name: value for name, value in super().to_dict().items() if not name.lstrip("_").startswith("load_in_")}
