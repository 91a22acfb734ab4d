"""The configuration that `from_pretrained(quantization_config=…)` takes for 4-bit experts."""

from typing import Any

from transformers import BitsAndBytesConfig

from ..errors import OrdMoEConfigError
from .storage import BLOCK_SIZE, PACKABLE_DTYPES


# The name of the package, for where it is not imported: transformers then names the method that it does not know.
QUANT_METHOD = "ordmoe_peft"
# What bitsandbytes' kernels take on every device (`bitsandbytes/_ops.py`); 32 lacks some of them.
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


class MoeBitsAndBytesConfig(BitsAndBytesConfig):
    """[`~transformers.BitsAndBytesConfig`] that also quantises stacks of experts, where most of a MoE's weights are.

    With the stock class, `load_in_4bit` silently leaves stacks of experts in bf16. With this one, they and the linear
    layers of the decoder, those of experts too, are packed in 4 bits, while routers, embeddings, heads, norms and the
    vision tower keep their dtype. `llm_int8_skip_modules` names what else does, by transformers' rules: a module or one
    of its parents (`"model.layers.0"`), an ending (`"experts"`), a single stack
    (`"model.layers.0.mlp.experts.down_proj"`) or a regular expression.

    transformers refuses it for a checkpoint that is quantised already, such as gpt-oss, which ships in MXFP4: load that
    with its own dequantisation (`Mxfp4Config(dequantize=True)`) and pack its experts in memory.

    Experts of transformers' experts interface are computed from packed weights. Stacks of other classes (Llama 4, DBRX,
    JetMoE, LongCat-Flash, Step 3.7, inkling's shared experts) are unpacked for each forward and again for backward,
    which is slower and needs memory for those of a layer. Where experts are modules of linear layers (Switch, NLLB),
    `bnb_4bit_quant_storage` is the model's dtype unless another floating one is given, since such experts may cast
    their input to the dtype of their weights.

    Args:
        load_in_4bit (`bool`, defaults to `True`): must be `True`; 8-bit experts are not supported.
        bnb_4bit_quant_type (`str`, defaults to `"nf4"`): `"nf4"` or `"fp4"`.
        bnb_4bit_blocksize (`int`, defaults to 64): weights that share a scale, from 64 to 4096 by powers of two. It is
            that of expert stacks, which are filled up to whole blocks; a linear layer, and a matrix of all experts
            (DBRX), takes the largest block up to it that divides its rows, and is not packed if 64 does not.
        offload_experts (`bool`, defaults to `False`): keep packed expert stacks in RAM, pinned where CUDA exists, and
            copy each layer's to the device while the one before it is computed. The device holds two layers' experts
            at a time. It changes no result. A setting of the session, which is not saved with the model: a checkpoint
            that is packed already takes it, too. Without `device_map` or with one device; on one process.
        kwargs: all other arguments of [`~transformers.BitsAndBytesConfig`], e.g. `bnb_4bit_use_double_quant`,
            `bnb_4bit_compute_dtype`, `llm_int8_skip_modules`.

    Raises:
        [`OrdMoEConfigError`]: 4-bit loading is off, `offload_experts` is no truth value, or the quantisation type, the
            block size or the dtype of computation is not supported.
    """

    def __init__(
        self,
        load_in_4bit: bool = True,
        bnb_4bit_quant_type: str = "nf4",
        bnb_4bit_blocksize: int = BLOCK_SIZE,
        offload_experts: bool = False,
        **kwargs,
    ):
        if not load_in_4bit or kwargs.get("load_in_8bit"):
            raise OrdMoEConfigError(
                "MoeBitsAndBytesConfig quantises to 4 bits only: leave `load_in_4bit=True` and `load_in_8bit` unset."
            )
        if bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise OrdMoEConfigError(f"bnb_4bit_quant_type must be 'nf4' or 'fp4', got {bnb_4bit_quant_type!r}.")
        if bnb_4bit_blocksize not in BLOCK_SIZES:
            raise OrdMoEConfigError(f"bnb_4bit_blocksize must be one of {BLOCK_SIZES}, got {bnb_4bit_blocksize!r}.")
        if not isinstance(offload_experts, bool):
            raise OrdMoEConfigError(f"offload_experts must be True or False, got {offload_experts!r}.")
        super().__init__(load_in_4bit=load_in_4bit, bnb_4bit_quant_type=bnb_4bit_quant_type, **kwargs)
        if self.bnb_4bit_compute_dtype not in PACKABLE_DTYPES:
            raise OrdMoEConfigError(
                f"bnb_4bit_compute_dtype must be one of {PACKABLE_DTYPES}, got {self.bnb_4bit_compute_dtype}."
            )
        self.quant_method = QUANT_METHOD
        self.bnb_4bit_blocksize = bnb_4bit_blocksize
        self.offload_experts = offload_experts

    def packing(self) -> dict[str, Any]:
        """The arguments of [`~ordmoe_peft.quantization.storage.pack_experts`] that this configuration stands for."""
        return {
            "quant_type": self.bnb_4bit_quant_type,
            "use_double_quant": self.bnb_4bit_use_double_quant,
            "compute_dtype": self.bnb_4bit_compute_dtype,
            "quant_storage": self.bnb_4bit_quant_storage,
            "blocksize": self.bnb_4bit_blocksize,
        }

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of this configuration counts where a checkpoint that is packed already brings its own."""
        return {"offload_experts": self.offload_experts}

    def to_dict(self) -> dict[str, Any]:
        """All settings of the weights, as `config.json` has them.

        Without `load_in_4bit`, which is always on: transformers takes any dictionary with it for the stock class's,
        whatever its `quant_method` (`AutoQuantizationConfig.from_dict` in `transformers/quantizers/auto.py`).
        """
        return {
            name: value
            for name, value in super().to_dict().items()
            if name != "offload_experts" and not name.lstrip("_").startswith("load_in_")
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """[`to_dict`]: upstream's compares with the stock class's defaults, which lack some of these settings."""
        return self.to_dict()
