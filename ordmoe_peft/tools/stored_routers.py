"""The routers in a base's checkpoint: by them a base is known, and an adapter's update of them can be added."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from ..adapter.base_record import hashed_tensors
from ..errors import OrdMoEModelError
from ..experts.expert_lora import check_finite
from .lora_factors import Factors
from .merge_on_disk.checkpoint import Checkpoint
from .merge_on_disk.parameter_sources import find_sources, read_parameters


DENSE = (torch.float32, torch.bfloat16, torch.float16)


class StoredRouters:
    """A base's routers in its checkpoint, with the embeddings beside them by which a base is known.

    Only tensors of the shapes of these are looked at: a base that is stored in 4 bits has them dense.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]): the base on the meta device, without an adapter.
        checkpoint ([`Checkpoint`]): where its tensors are.
    """

    def __init__(self, skeleton: PreTrainedModel, checkpoint: Checkpoint):
        wanted = hashed_tensors(skeleton)
        shapes = {tensor.shape for tensor in wanted.values()}
        like = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.shape in shapes}
        found = find_sources(skeleton, like, None)
        self.checkpoint, self.sources = checkpoint, {name: found[name] for name in wanted if name in found}

    def weights(self) -> dict[str, torch.Tensor]:
        """All of them, under the model's names."""
        return read_parameters(self.checkpoint, self.sources.values())

    def folded(self, routers: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
        """Routers' matrices with their updates added, under the checkpoint's own names and in its dtypes.

        Sums are in float32 and rounded once.

        Args:
            routers (`Mapping[str, Factors]`): name of a router's matrix in the model → its update.

        Raises:
            [`OrdMoEModelError`]: the checkpoint lacks a router, has it in another form than floating-point numbers of
                16 or 32 bits, or the sum is not finite.
        """
        patched: dict[str, torch.Tensor] = {}
        for name, factors in routers.items():
            if name not in self.sources:
                raise OrdMoEModelError(
                    f"{self.checkpoint.folder} has no tensor for the router {name}. Give the adapter's base."
                )
            source = self.sources[name]
            parameters = source.to_parameters(self.checkpoint.read(source.names))
            weight_EI = parameters[name]
            if weight_EI.dtype not in DENSE:
                raise OrdMoEModelError(
                    f"{name} is of dtype {weight_EI.dtype} in {self.checkpoint.folder}. Give a dense base."
                )
            parameters[name] = (weight_EI.float() + factors.delta()[0]).to(weight_EI.dtype)
            check_finite(parameters[name], name, ["the adapter"])
            patched |= source.to_tensors(parameters)
        return {name: tensor.contiguous() for name, tensor in patched.items()}
