"""4-bit storage of experts, and how a checkpoint is loaded into it."""

from .config import MoeBitsAndBytesConfig
from .quantize_model import quantize_experts_


__all__ = ["MoeBitsAndBytesConfig", "quantize_experts_"]
