"""What experts in 4 bits compute: the dequantised model's values and gradients, at the memory of 4 bits."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEModelError, OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel, unwrapped
from ordmoe_peft.quantization.storage import dense_stack, is_packed
from tests import models, reference


LAYOUTS = {
    "(E, O, I)": models.qwen3_moe,
    "transposed, biased, interleaved": models.gpt_oss,
    "transposed, biased, concatenated": models.openai_privacy_filter,
    "not gated": models.nemotron_h,
    "shared experts": models.qwen2_moe,
    "vision-language": models.qwen3_vl_moe,
}
QUANTISATIONS = {
    "nf4": {},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4, double": {"bnb_4bit_use_double_quant": True},
    "fp4, double, blocks of 256": {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_blocksize": 256,
    },
    "nf4, kept as bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},
}
ROUTINGS = {
    "mixed, experts without tokens": [[2, 0], [0, 3], [2, 3], [1, 0], [2, 1]],
    "all tokens on one expert": [[3], [3], [3]],
    "one token": [[1, 4]],
}
# Largest error, as a share of the largest value: some ten roundings, where few numbers are summed.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def adapted(model):
    """`model` with an adapter that does something, always the same; its scaling is no power of two."""
    torch.manual_seed(6)
    tuned = get_peft_model(model, OrdMoEConfig(r=6, lora_alpha=4))
    models.randomize_adapter(tuned)
    return tuned


def inputs(routing: list[list[int]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    index_TK = torch.tensor(routing)
    x_TH = torch.randn(len(index_TK), models.HIDDEN_SIZE, generator=generator).to(dtype).requires_grad_()
    weights_TK = torch.rand(index_TK.shape, generator=generator).to(dtype).requires_grad_()
    return x_TH, index_TK, weights_TK


def dense_weights(experts, module, scaling: float) -> dict[str, torch.Tensor]:
    """Each stack of `module` in double precision, with the delta of the adapter that wraps it in `experts`."""
    weights = {}
    while experts is not module:
        delta = reference.expert_deltas(
            experts.lora_A["default"].weight.double(),
            experts.lora_B["default"].weight.double(),
            module.num_experts,
            scaling,
        )
        weights[experts.parameter_name] = delta.transpose(1, 2) if module.is_transposed else delta
        experts = experts.base_layer
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        stack = dense_stack(getattr(module, name), torch.float64)
        weights[name] = stack + weights[name] if name in weights else stack
    return weights


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_those_of_the_slow_reference(layout, dtype, with_adapter):
    blocks = {"layers_block_type": ["full_attention", "moe"], "num_hidden_layers": 2}
    dense = LAYOUTS[layout](**(blocks if layout == "not gated" else {"num_hidden_layers": 1})).to(dtype)
    name = MoEModel.of(dense).layers[0].experts_name
    for quantisation in QUANTISATIONS.values():
        config = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **quantisation)
        model = quantize_experts_(copy.deepcopy(dense), config)
        model = adapted(model).base_model.model if with_adapter else model
        experts = model.get_submodule(name)
        module = unwrapped(experts)
        trained = [parameter for parameter in experts.parameters() if parameter.requires_grad]
        assert len(trained) == (4 if with_adapter else 0)
        for routing in ROUTINGS.values():
            x, index, weights = inputs(routing, dtype)
            got = experts(x, index, weights)
            exact_x, exact_weights = x.double(), weights.double()
            wanted = reference.experts(module, exact_x, index, exact_weights, dense_weights(experts, module, 4 / 6))
            assert got.dtype == dtype
            assert relative_error(got, wanted) < TOLERANCE[dtype]
            # Along the output, so that what the routing weights' gradients sum up does not cancel out.
            direction = got.detach()
            parts = [x, weights, *trained]
            for mine, true in zip(
                torch.autograd.grad(got, parts, direction),
                torch.autograd.grad(wanted, parts, direction.double()),
                strict=True,
            ):
                assert mine.isfinite().all()
                assert relative_error(mine, true) < TOLERANCE[dtype]


def test_packed_experts_are_frozen_with_their_biases():
    model = quantize_experts_(models.gpt_oss(), MoeBitsAndBytesConfig())
    module = model.get_submodule(MoEModel.of(model).layers[0].experts_name)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.down_proj_bias.requires_grad_()
    with pytest.raises(OrdMoEModelError, match="down_proj_bias of GptOssExperts want gradients"):
        model(**models.text_batch())
    with torch.no_grad():
        model(**models.text_batch())


def values_and_gradients(model, embeds: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients of a sum of them by input embeddings and by every trained weight."""
    model.zero_grad()
    embeds = embeds.clone().requires_grad_()
    batch = models.text_batch()
    logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    generator = torch.Generator().manual_seed(5)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    return [logits.detach(), embeds.grad, *gradients]


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_are_their_dequantised_twins(layout, with_adapter):
    packed = quantize_experts_(LAYOUTS[layout](), MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True))
    dense = copy.deepcopy(packed).dequantize()
    embeds = packed.get_input_embeddings()(models.text_batch()["input_ids"]).detach()
    if with_adapter:
        packed, dense = adapted(packed), adapted(dense)
    got, wanted = (values_and_gradients(model, embeds) for model in (packed, dense))
    assert len(got) == (2 if not with_adapter else 2 + sum("lora_" in name for name, _ in packed.named_parameters()))
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_error(mine, theirs) < 1e-4


@pytest.mark.parametrize("layout", ["(E, O, I)", "transposed, biased, interleaved", "not gated"])
def test_no_dense_expert_lives_between_forward_and_backward(layout):
    # Few rows and large experts, so that nothing else is as large as one expert's matrix.
    width = "intermediate_size" if layout.startswith("transposed") else "moe_intermediate_size"
    packed = quantize_experts_(LAYOUTS[layout](hidden_size=256, **{width: 256}))
    smallest = min(p.quant_state.shape[1:].numel() for p in packed.parameters() if is_packed(p))
    model = get_peft_model(packed, OrdMoEConfig(r=1, targets=["experts"]))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    batch = {"input_ids": torch.tensor([[5, 6]])}

    def is_dense_weight(tensor: torch.Tensor) -> bool:
        return tensor.is_floating_point() and tensor.numel() >= smallest and tensor.data_ptr() not in own

    def alive() -> int:
        gc.collect()
        return sum(is_dense_weight(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    saved = []
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(**batch).logits.square().sum()
    assert saved
    assert not any(is_dense_weight(tensor) for tensor in saved)
    # Nor in what a function keeps beside its saved tensors.
    assert alive() == before
    loss.backward()


def test_packed_bytes_kept_as_bfloat16_are_the_same_weights():
    batch = models.text_batch()
    plain = quantize_experts_(models.qwen3_moe())
    kept = quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16))
    for one, other in zip(plain.parameters(), kept.parameters(), strict=True):
        if is_packed(one):
            assert (one.dtype, other.dtype) == (torch.uint8, torch.bfloat16)
            assert torch.equal(one.view(-1), other.view(-1).view(torch.uint8))
            assert not other.requires_grad
    one, other = adapted(plain), adapted(kept)
    with torch.no_grad():  # PEFT rounds the first lora_A to the base weight's dtype, where that is a floating one
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            if mine.requires_grad:
                theirs.copy_(mine)
    assert [p.dtype for p in one.parameters() if p.requires_grad] == [
        p.dtype for p in other.parameters() if p.requires_grad
    ]
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, other(**batch).logits)


def test_bytes_that_were_cast_as_numbers_are_refused():
    config = MoeBitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16)
    model = quantize_experts_(models.qwen3_moe(), config).to(torch.float32)
    with pytest.raises(OrdMoERuntimeError, match=r"cast from torch\.bfloat16 to torch\.float32.*Load the model anew"):
        model(**models.text_batch())
    # Bytes kept as such are not cast, and the rest may be.
    cast = quantize_experts_(models.qwen3_moe()).to(torch.bfloat16)
    assert cast(**models.text_batch()).logits.dtype == torch.bfloat16
