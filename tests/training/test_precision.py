"""Training in fp16 with a gradient scaler, on the path that cards without bf16 take.

accelerate makes no scaler on a CPU, so here one is put where it would be, and all else is as on a GPU: autocast in
fp16, scaled losses, unscaling before the norm is clipped, and the scaler's own say in whether the optimizer steps.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, OrdMoETrainer
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.experts import forward
from ordmoe_peft.experts.tuning import on_gpu
from ordmoe_peft.training import precision
from ordmoe_peft.training.precision import prepare_for_scaler_
from tests import models, text
from tests.training.test_trainer import adapted, trained, trainer_for


MODES = pytest.mark.parametrize("mode", ["batched", "sequential"])
FP16 = {"fp16": True, "use_cpu": True}


class Scaled(OrdMoETrainer):
    """The trainer as accelerate sets it up for fp16 on a GPU."""

    scale = 2.0**16

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.accelerator.mixed_precision == "fp16":
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
            self.accelerator.native_amp = True


class Unscaled(Scaled):
    """The same mixed precision with gradients as they are."""

    scale = 1.0


class ScaledTooFar(Scaled):
    """Its first steps overflow, as those of most runs do."""

    scale = 2.0**22


def overflows(trainer) -> list[bool]:
    """Of each step, whether its gradient overflowed, by the norm that was logged."""
    return [not math.isfinite(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(precision.logger, "warning", messages.append)
    return messages


@pytest.fixture(autouse=True)
def experts_as_on_gpus(monkeypatch):
    monkeypatch.setattr(forward, "work_sizes", lambda device: on_gpu())


def packed(folder, dtype=torch.float16, device_map=None) -> torch.nn.Module:
    """A tiny Qwen3-MoE with all that can be in 4 bits in them, as a card without bf16 holds it."""
    model = models.qwen3_moe().to(dtype)
    model.save_pretrained(folder)
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=dtype)
    return type(model).from_pretrained(folder, dtype=dtype, quantization_config=nf4, device_map=device_map)


def weights_of(trainer) -> list[torch.Tensor]:
    return [weight for weight in trainer.model.parameters() if weight.requires_grad]


def distance(weights, others) -> float:
    """Norm of the difference over the norm."""
    parts = [(others[name] - weight).square().sum() for name, weight in weights.items()]
    return (sum(parts) / sum(weight.square().sum() for weight in weights.values())).sqrt().item()


SETTINGS = {
    "erl, not clipped": {"max_grad_norm": 0.0},
    "erl, clipped": {"max_grad_norm": 0.1, "gradient_checkpointing": True},
    "dpo": {"objective": "dpo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@MODES
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_updates_are_those_without_a_scaler(tmp_path, mode, name):
    """SGD moves the weights by the gradient itself: a scale that is left in, or taken out twice, would show."""
    changes = {"tier_passes": mode, "optim": "sgd", "learning_rate": 1.0, "erl_coef": 0.3, "max_steps": 2}
    changes |= SETTINGS[name]
    start = dict(adapted().named_parameters())
    losses, weights = trained(trainer_for(tmp_path, **changes))
    scaled = trainer_for(tmp_path, cls=Scaled, **changes, **FP16)
    scaled_losses, scaled_weights = trained(scaled)
    assert scaled.accelerator.scaler.get_scale() == 2.0**16, "no step overflowed"
    assert scaled_losses == pytest.approx(losses, rel=1e-3)
    moved = {name: weight - start[name] for name, weight in weights.items()}
    scaled_moved = {name: scaled_weights[name] - start[name] for name in moved}
    # fp16 rounds by up to 5e-4.
    assert distance(moved, scaled_moved) < 0.01
    assert distance(moved, {name: 0 * weight for name, weight in moved.items()}) == 1


@MODES
@pytest.mark.parametrize("is_packed", [False, True], ids=["fp16", "nf4"])
def test_updates_do_not_depend_on_the_scale(tmp_path, mode, is_packed):
    """On bases in fp16, whose every gradient passes through it."""
    runs = []
    for cls in (Unscaled, Scaled):
        base = packed(tmp_path) if is_packed else models.qwen3_moe().half()
        model = adapted(lambda base=base: base)
        start = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
        changes = {"tier_passes": mode, "optim": "sgd", "learning_rate": 1.0, "erl_coef": 0.3, "max_steps": 2}
        losses, weights = trained(trainer_for(tmp_path, model, cls, **changes, **FP16))
        runs.append((losses, {name: weight - start[name] for name, weight in weights.items()}))
    (losses, moved), (scaled_losses, scaled_moved) = runs
    assert scaled_losses == pytest.approx(losses, rel=1e-3)
    assert distance(moved, scaled_moved) < 0.01


@pytest.mark.parametrize(("mode", "optim"), [("batched", "adamw_torch_fused"), ("sequential", "adamw_torch")])
def test_packed_base(tmp_path, told, mode, optim):
    """TRL holds the adapter in bf16, whose gradients torch does not unscale on CUDA."""
    model = get_peft_model(packed(tmp_path), OrdMoEConfig(r=4, targets=["router", "experts", "attention"]))
    trainer = trainer_for(tmp_path, model, Scaled, tier_passes=mode, optim=optim, max_steps=6, **FP16)
    assert {weight.dtype for weight in weights_of(trainer)} == {torch.float32}
    assert [message.split(", since")[0] for message in told] == [
        f"fp16=True: {len(weights_of(trainer))} trained weights are held in float32"
    ]
    gradients = []
    for weight in weights_of(trainer):
        weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.dtype))
    losses, _ = trained(trainer)
    assert losses[-1] < losses[0] - 0.3
    assert set(gradients) == {torch.float32}
    assert trainer._guard.num_dropped == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_16_bits_is_widened(tmp_path, told, dtype):
    """With fp16 gradients torch's scaler would end with "Attempting to unscale FP16 gradients"."""
    base = models.qwen3_moe().to(dtype)
    model = get_peft_model(base, OrdMoEConfig(r=4), autocast_adapter_dtype=False)
    narrow = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in narrow} == {dtype}
    trainer = trainer_for(tmp_path, model, Scaled, max_steps=1, **FP16)
    for weight, before in zip(weights_of(trainer), narrow, strict=True):
        assert torch.equal(weight, before.float()) and weight.dtype == torch.float32
    trainer.train()
    assert len(told) == 1


def test_without_fp16_trls_dtype_stays(tmp_path, told):
    model = get_peft_model(packed(tmp_path, torch.bfloat16), OrdMoEConfig(r=4))
    assert {weight.dtype for weight in weights_of(trainer_for(tmp_path, model))} == {torch.bfloat16}
    assert told == []


def test_a_cpu_has_no_scaler(tmp_path):
    with pytest.raises(OrdMoEConfigError, match="fp16=True has no effect on cpu.*bf16=True works on a CPU"):
        trainer_for(tmp_path, **FP16)


def test_fp16_weights_without_a_scaler_are_warned_of(tmp_path, told):
    trainer_for(tmp_path, get_peft_model(models.qwen3_moe().half(), OrdMoEConfig(r=4)))
    (message,) = told
    assert "weights are in float16, and without fp16=True no scaler" in message


def test_deepspeed_has_a_scaler_of_its_own(told):
    model = adapted().half()
    prepare_for_scaler_(model, SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    assert told == []


def test_a_resumed_run_goes_on_at_its_scale(tmp_path):
    """Its first steps overflow; killed after them, it takes the same steps as if it had not been."""
    settings = {"tier_passes": "sequential", "save_strategy": "steps", "save_steps": 5, "max_steps": 10, **FP16}
    whole = trainer_for(tmp_path, cls=ScaledTooFar, **settings)
    _, weights = trained(whole)
    assert 1 <= overflows(whole).index(False) <= 4
    overflowed = whole._guard.counts["overflowed_steps"]
    assert overflowed == sum(overflows(whole))
    resumed = trainer_for(tmp_path, cls=Scaled, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale() == 2.0 ** (22 - overflowed)
    assert resumed._guard.counts == whole._guard.counts
    assert all(torch.equal(dict(resumed.model.named_parameters())[name], weight) for name, weight in weights.items())


def test_evaluation_and_generated_responses_run_in_fp16(tmp_path):
    changes = {"responses": "generated", "max_completion_length": 4, "max_steps": 2}
    trainer = trainer_for(tmp_path, cls=Scaled, **changes, **FP16)
    losses, _ = trained(trainer)
    assert len(losses) == 2
    assert trainer.evaluate(text.conversations())["eval_loss"] > 0
