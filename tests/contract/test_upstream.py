"""What we rely on upstream; each test fails when a shim in `_compat.py` may go, or must change."""

import inspect
import pickle
from dataclasses import fields

import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.peft_types import PeftType
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from transformers import BitsAndBytesConfig, Trainer, modeling_layers
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.quantizers import auto

import ordmoe_peft  # noqa: F401
from ordmoe_peft._compat import (
    accelerate_hook,
    activation_of,
    is_expert_parallel,
    own_forward_name,
    saved_tensors_hooks_in_use,
)
from ordmoe_peft.experts.expert_lora import ExpertLora
from ordmoe_peft.experts.weight_lora import WeightLora
from ordmoe_peft.moe_model import is_fused_experts
from ordmoe_peft.training._compat import mark_step_skipped
from tests import models


def test_peft_type_is_a_member_like_any_other():
    assert PeftType("ORDMOE") is PeftType["ORDMOE"] is PeftType.ORDMOE
    assert PeftType.ORDMOE == "ORDMOE"
    assert "ORDMOE" in list(PeftType)


def test_peft_recognises_nested_wrappers_by_class_name():
    source = inspect.getsource(tuners_utils.BaseTuner._inject_parameters)
    assert '__class__.__name__ != "ParamWrapper"' in source
    for layer in (ExpertLora, WeightLora):
        assert layer.__name__ == ParamWrapper.__name__ == "ParamWrapper"
        assert issubclass(layer, ParamWrapper)
        assert pickle.loads(pickle.dumps(layer)) is layer, "pickle goes by the qualified name"


def test_bitsandbytes_layers_have_the_switch_for_repacking_on_cpu():
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")


def test_checkpointed_layers_keep_their_function_as_an_attribute():
    model = models.qwen3_moe()
    model.gradient_checkpointing_enable()
    layer = model.model.layers[0]
    assert isinstance(layer, modeling_layers.GradientCheckpointingLayer)
    assert callable(layer.__dict__["_gradient_checkpointing_func"])


def test_the_trainer_writes_the_state_last_and_then_deletes():
    for name in ("_get_output_dir", "_save_rng_state", "_run_epoch", "_finalize_training"):
        assert callable(getattr(Trainer, name))
    source = inspect.getsource(Trainer._save_checkpoint)
    order = (
        "self.save_model(",
        "self._save_rng_state(",
        ".save_to_json(",
        "rotate_checkpoints(",
        "args.save_total_limit",
    )
    places = [source.index(text) for text in order]
    assert places == sorted(places)


def test_the_wrapper_of_fsdps_checkpointing_calls_its_function_by_this_name():
    layer = checkpoint_wrapper(torch.nn.Linear(2, 2))
    assert isinstance(layer, CheckpointWrapper)
    layer.checkpoint_fn = lambda function, *args, **kwargs: "called"
    assert layer(torch.zeros(1, 2)) == "called"


def test_experts_carry_the_flags_and_take_further_arguments():
    @use_experts_implementation
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 2

    class Config:
        _experts_implementation = "contract_test"

    ALL_EXPERTS_FUNCTIONS.register("contract_test", lambda self, x, index, weights, expert_lora=None: expert_lora)
    try:
        experts = Experts(Config())
        assert is_fused_experts(experts)
        assert experts(1, 2, 3, expert_lora="factors") == "factors"
        assert is_expert_parallel(experts) is False
        assert callable(activation_of(experts))
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("contract_test")


def test_accelerate_keeps_its_hook_on_the_module():
    linear, hook = torch.nn.Linear(2, 2), ModelHook()
    assert accelerate_hook(linear) is None
    add_hook_to_module(linear, hook)
    assert accelerate_hook(linear) is hook


def test_accelerate_keeps_the_forward_that_its_hook_calls_on_the_module():
    module = torch.nn.Linear(2, 2)
    assert own_forward_name(module) == "forward"
    add_hook_to_module(module, ModelHook())
    assert own_forward_name(module) in vars(module)
    assert vars(module)[own_forward_name(module)].__func__ is torch.nn.Linear.forward


def test_the_hooks_on_saved_tensors_are_the_innermost():
    def outer(saved):
        return saved

    def inner(saved):
        return saved

    assert saved_tensors_hooks_in_use() is None
    with saved_tensors_hooks(outer, outer), saved_tensors_hooks(inner, outer):
        assert saved_tensors_hooks_in_use() == (inner, outer)


def test_accelerate_takes_an_overflow_of_fused_optimizers_for_a_step():
    weight = torch.nn.Parameter(torch.ones(2))
    Accelerator(cpu=True)  # its optimizers ask for the state that this makes
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], fused=True), scaler=scaler)
    scaler.scale(weight.sum()).backward()
    weight.grad.fill_(torch.inf)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    assert not optimizer.step_was_skipped, "`mark_step_skipped` may go"
    mark_step_skipped(optimizer)
    assert optimizer.step_was_skipped


def test_saving_reverts_the_conversions_that_the_model_lists():
    model = models.qwen3_moe()
    own, cut = model.state_dict(), "model.layers.0.mlp.experts.0.gate_proj.weight"
    model._weight_conversions = []
    assert revert_weight_conversion(model, own).keys() == own.keys()
    model._weight_conversions = None
    assert cut in revert_weight_conversion(model, own)


def test_peft_hands_loaded_weights_to_the_tuner_before_it_copies_them():
    # `OrdMoEModel` looks at names and shapes there.
    source = inspect.getsource(set_peft_model_state_dict)
    remap = inspect.signature(tuners_utils.BaseTuner._remap_adapter_state_dict_for_load)
    assert list(remap.parameters) == ["model", "config", "adapter_name", "state_dict"]
    assert source.index("_remap_adapter_state_dict_for_load(") < source.index(".load_state_dict(")


def test_transformers_asks_registered_classes_alone_for_their_loading_attributes():
    class Registered(BitsAndBytesConfig):
        def get_loading_attributes(self):
            return {"offload_experts": True}

    stored, given = Registered(load_in_4bit=True), Registered(load_in_4bit=True)
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    types = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    try:
        assert not hasattr(merge(stored, given), "offload_experts")
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (Registered,)
        assert merge(stored, given).offload_experts
    finally:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = types


def test_peft_marks_its_variants_of_lora():
    # `lora_fields.py` refuses them for parameters.
    marked = {field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert {"use_dora", "alora_invocation_tokens", "kasa_config", "velora_config"} <= marked
