"""What steps of optimizers make, and let go."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from examples.benchmarks.measuring import peak_of
from ordmoe_peft.tools.plan.optimizer_step import AT_ONCE, step_temporaries
from ordmoe_peft.training.optimizer_states import OPTIMIZERS


def parameters_with_gradients(dtype) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((800, 3), (4000,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_temporaries_are_what_torch_holds(name, dtype):
    parameters = parameters_with_gradients(dtype)
    optimizer = OPTIMIZERS[name](parameters, foreach=name in AT_ONCE, fused=name not in AT_ONCE)
    optimizer.step()
    measured = peak_of(optimizer.step)
    assert step_temporaries(name, parameters) == pytest.approx(measured, abs=200), "but for scalars"


def test_only_adamw_at_once_has_temporaries_of_the_size_of_the_adapter():
    parameters = parameters_with_gradients(torch.bfloat16)
    temporaries = {name: step_temporaries(name, parameters) for name in OPTIMIZERS}
    assert temporaries.pop("adamw_torch") == sum(parameter.nbytes for parameter in parameters)
    assert set(temporaries.values()) == {0}


@pytest.mark.parametrize(("name", "asked"), [("adamw_torch", {}), ("adamw_torch_fused", {"fused": True})])
def test_the_trainer_asks_for_fused_alone(name, asked, tmp_path):
    """Where neither is asked for, torch takes `foreach` on CUDA."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(tmp_path, optim=name, use_cpu=True))
    assert kind is OPTIMIZERS[name]
    assert {key: value for key, value in settings.items() if key in ("foreach", "fused")} == asked
