"""4-bit storage of fused expert stacks, and how a checkpoint is loaded into it."""

from .config import MoeBitsAndBytesConfig


__all__ = ["MoeBitsAndBytesConfig"]
