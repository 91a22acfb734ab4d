"""LoRA's factors under the names that servers read.

    vllm-3d          experts.base_layer.lora_A.weight  (E·r, H)    experts.base_layer.lora_B.weight  (2F, r·E)
                     experts.lora_A.weight             (E·r, F)    experts.lora_B.weight             (H, r·E)
    vllm-2d, sglang  experts.0.gate_proj.lora_A.weight (r, H)      experts.0.gate_proj.lora_B.weight (F, r)
                     experts.0.up_proj.…   likewise, with the same A
                     experts.0.down_proj.lora_A.weight (r, F)      experts.0.down_proj.lora_B.weight (H, r)
    all              mlp.gate.lora_A.weight            (r, H)      mlp.gate.lora_B.weight            (E, r)

Experts are the slow index of A's rows and the fast index of B's columns in `vllm-3d`, as PEFT has them. Rows of the
gate and the up-projection stay as the base has them there, side by side or taking turns; per expert they come apart.
"""

import torch

from ..lora_factors import Factors


PREFIX = "base_model.model."


def fused_keys(experts: str, up: Factors, down: Factors) -> dict[str, torch.Tensor]:
    """The experts in the module called `experts`, in PEFT's two pairs of matrices; `up` has the gate's rows, too."""
    return keys(f"{experts}.base_layer", up) | keys(experts, down)


def per_expert_keys(experts: str, gate_up: Factors, down: Factors, is_concatenated: bool) -> dict[str, torch.Tensor]:
    """The experts in the module called `experts`, each with keys of its own."""
    gate, up = gate_up.gate_and_up(is_concatenated)
    return {
        key: tensor
        for name, factors in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        for index, each in enumerate(factors.by_expert())
        for key, tensor in keys(f"{experts}.{index}.{name}", each).items()
    }


def keys(module: str, factors: Factors) -> dict[str, torch.Tensor]:
    """The two matrices of a module, each in memory of its own, as safetensors wants them."""
    A, B = factors.to_peft()
    return {f"{PREFIX}{module}.lora_A.weight": A.clone(), f"{PREFIX}{module}.lora_B.weight": B}
