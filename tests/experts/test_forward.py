"""The experts function against one token and one expert at a time: every layout, dense and in 4 bits, with LoRA."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from ordmoe_peft.experts import forward as forward_of_experts
from ordmoe_peft.experts.forward import LoraHandover
from ordmoe_peft.experts.frozen import LowRank
from ordmoe_peft.experts.tuning import ON_CPU, WorkSizes, on_gpu
from ordmoe_peft.quantization.storage import dense_stack, pack_experts
from tests import reference


NUM_EXPERTS, HIDDEN, WIDTH, R = 5, 16, 24, 3


def experts_forward(module, x, index, weights, expert_lora=None):
    """The experts function, given factors as their wrappers hand them over."""
    handed = None if expert_lora is None else LoraHandover(expert_lora)
    output = forward_of_experts.experts_forward(module, x, index, weights, handed)
    assert handed is None or handed.is_taken
    return output


LAYOUTS = {
    "gated": {},
    "transposed": {"is_transposed": True},
    "biased": {"has_bias": True},
    "transposed and biased": {"is_transposed": True, "has_bias": True},
    "not gated": {"has_gate": False},
    "normed": {"has_post_expert_norm": True},
}
ROUTINGS = {
    "one expert with most tokens": [[1, e] for e in (0, 2, 3, 4)] + [[1, 0]] * 20,
    "mixed, one expert empty": [[2, 0], [0, 3], [2, 3], [1, 0]],
    "all tokens on one expert": [[3], [3], [3]],
    "one token": [[1, 4]],
    "one row": [[4]],
}


# Rows of 16 and 24 weights are not whole blocks.
PACKINGS = {
    "dense": None,
    "NF4": {"quant_type": "nf4"},
    "FP4, double": {"quant_type": "fp4", "use_double_quant": True, "blocksize": 128},
}


class Config:
    _experts_implementation = "eager"


def build_experts(num_experts=NUM_EXPERTS, hidden=HIDDEN, width=WIDTH, **flags) -> nn.Module:
    has_gate = flags.get("has_gate", True)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            # Not zero at zero, as sigmoid: what stands in gaps of the layout must not count.
            self.num_experts, self.act_fn = num_experts, nn.SiLU() if has_gate else nn.Sigmoid()
            self.post_expert_norm = nn.RMSNorm(hidden).requires_grad_(False)

    module = use_experts_implementation(Experts, **flags)(Config())
    up_name, up_features = ("gate_up_proj", 2 * width) if has_gate else ("up_proj", width)
    for name, out_features, in_features in ((up_name, up_features, hidden), ("down_proj", hidden, width)):
        shape = (in_features, out_features) if flags.get("is_transposed") else (out_features, in_features)
        setattr(module, name, nn.Parameter(torch.randn(num_experts, *shape) * 0.3, requires_grad=False))
        if flags.get("has_bias"):
            setattr(module, f"{name}_bias", nn.Parameter(torch.randn(num_experts, out_features), requires_grad=False))
    return module


def build_lora(module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's weights of both projections: A `(E·r, I)`, B `(O, r·E)`."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up_features = (2 if module.has_gate else 1) * WIDTH
    return {
        name: (
            torch.randn(NUM_EXPERTS * R, in_features, requires_grad=True),
            torch.randn(out_features, R * NUM_EXPERTS, requires_grad=True),
        )
        for name, out_features, in_features in ((up_name, up_features, HIDDEN), ("down_proj", HIDDEN, WIDTH))
    }


def factors(A, B, scaling=0.5) -> list[LowRank]:
    return [LowRank(A, B, NUM_EXPERTS, scaling)]


# How many experts one operation takes: one, as on CPU; as on GPUs, here two at a time in bins of few, or all at once.
SIZES = {
    "one at a time": ON_CPU,
    "two at a time": WorkSizes(slots=1, bin_cost=600, row_step=8, matrices=2 * HIDDEN * 2 * WIDTH * 4),
    "all at once": on_gpu(),
}


def stacks_with_updates(module, updates, packing=None) -> dict[str, torch.Tensor]:
    """Dense stacks with the deltas of `updates` added. Packs those of `module` first, where there is a `packing`."""
    stacks = {}
    for name, [update] in updates.items():
        if packing is not None:
            setattr(module, name, pack_experts(getattr(module, name).data, name, **packing))
        weight = getattr(module, name)
        dense = weight if packing is None else dense_stack(weight, torch.float32)
        delta = reference.expert_deltas(update.A, update.B, NUM_EXPERTS, update.scaling)
        stacks[name] = dense + (delta.transpose(1, 2) if module.is_transposed else delta)
    return stacks


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("packed", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(flags, routing, packed, sizes, monkeypatch):
    monkeypatch.setattr(forward_of_experts, "work_sizes", lambda device: sizes)
    module = build_experts(**flags)
    lora = build_lora(module)
    index = torch.tensor(routing)
    x = torch.randn(len(index), HIDDEN, requires_grad=True)
    weights = torch.rand(index.shape, requires_grad=True)
    updates = {name: factors(*ab) for name, ab in lora.items()}
    stacks = stacks_with_updates(module, updates, packed)
    got = experts_forward(module, x, index, weights, expert_lora=updates)
    wanted = reference.experts(module, x, index, weights, stacks)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    inputs = [x, weights, *(tensor for ab in lora.values() for tensor in ab)]
    direction = torch.randn_like(wanted)
    for mine, true in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


WAYS = [(way, PACKINGS[packing]) for way in (*SIZES, "few on CPU", "few elsewhere") for packing in ("dense", "NF4")]


@pytest.mark.parametrize("place", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize(("way", "packed"), [*WAYS, ("trained", None)])
def test_lora_on_one_projection_alone(way, packed, place, monkeypatch):
    sizes = SIZES.get(way, on_gpu() if way == "few elsewhere" else ON_CPU)
    monkeypatch.setattr(forward_of_experts, "work_sizes", lambda device: sizes)
    is_few = way.startswith("few")
    for flags in (LAYOUTS["transposed and biased"], LAYOUTS["not gated"]):
        for routing in (ROUTINGS["mixed, one expert empty"], ROUTINGS["one token"]):
            module = build_experts(**flags).train(not is_few).requires_grad_(way == "trained")
            lora, index = build_lora(module), torch.tensor(routing)
            name, ab = list(lora.items())[place]
            # The other's delta is none: both stacks are packed where one is.
            nothing = [torch.zeros_like(tensor) for ab in lora.values() for tensor in ab]
            updates = {other: factors(*nothing[2 * at : 2 * at + 2]) for at, other in enumerate(lora)}
            updates[name] = factors(*ab)
            stacks = stacks_with_updates(module, updates, packed)
            x = torch.randn(len(index), HIDDEN, requires_grad=True)
            weights = torch.rand(index.shape, requires_grad=True)
            wanted = reference.experts(module, x, index, weights, stacks)
            with torch.set_grad_enabled(not is_few):
                got = experts_forward(module, x, index, weights, {name: updates[name]})
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            if is_few:
                continue
            inputs, direction = [x, weights, *ab], torch.randn_like(wanted)
            for mine, true in zip(
                torch.autograd.grad(got, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
            ):
                torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


def popular(num_experts: int, tokens: int, skew: float) -> torch.Tensor:
    """A routing to two experts each (`torch.Tensor` of shape `(T, 2)`), by Zipf's law."""
    return (torch.randn(tokens, num_experts) - skew * torch.arange(1, num_experts + 1).log()).topk(2).indices


@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("use_double_quant", [False, True])
def test_blocks_of_experts_give_what_experts_one_at_a_time_give(use_double_quant, dtype, skew, monkeypatch):
    """Rows of whole blocks, more experts than rows on some, some absent, and sizes of blocks that do not divide."""
    num_experts, hidden, width, r = 24, 64, 128, 4
    module, lora = build_experts(num_experts, hidden, width).to(dtype), {}
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(module, name).data
        setattr(module, name, pack_experts(stack, name, use_double_quant=use_double_quant))
        _, out_features, in_features = stack.shape
        A, B = torch.randn(num_experts * r, in_features), torch.randn(out_features, r * num_experts)
        lora[name] = (A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_())
    index = popular(num_experts, 100, skew)
    assert (len(index.unique()) < num_experts) == (skew > 0)
    x, weights = (
        torch.randn(100, hidden, dtype=dtype).requires_grad_(),
        torch.rand(100, 2, dtype=dtype).requires_grad_(),
    )
    inputs = [x, weights, *(tensor for ab in lora.values() for tensor in ab)]

    def run(sizes):
        monkeypatch.setattr(forward_of_experts, "work_sizes", lambda device: sizes)
        updates = {name: [LowRank(*ab, num_experts, 0.5)] for name, ab in lora.items()}
        output = experts_forward(module, x, index, weights, updates)
        return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]

    wanted = run(ON_CPU)
    for matrices in (1, 5 * 2 * width * hidden * dtype.itemsize, 2**30):
        got = run(WorkSizes(slots=20_000, bin_cost=60_000, row_step=8, matrices=matrices))
        for mine, its in zip(got, wanted, strict=True):
            scale = its.abs().max().item()
            torch.testing.assert_close(mine, its, rtol=0, atol=scale * (1e-6 if dtype == torch.float32 else 0.01))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_experts_are_computed_in_a_dtype_of_their_own(flags, compute_dtype, sizes, monkeypatch):
    """A model in bf16 whose experts are packed by default is computed in fp32."""
    monkeypatch.setattr(forward_of_experts, "work_sizes", lambda device: sizes)
    module = build_experts(**flags)
    lora = build_lora(module)
    for name in lora:
        stack = getattr(module, name).data
        setattr(module, name, pack_experts(stack, name, compute_dtype=torch.float32))
    index = torch.tensor(ROUTINGS["mixed, one expert empty"])
    x, weights = torch.randn(len(index), HIDDEN).bfloat16().requires_grad_(), torch.rand(index.shape).requires_grad_()
    inputs = [x, weights, *(tensor for ab in lora.values() for tensor in ab)]

    def run():
        output = experts_forward(module, x, index, weights, {name: factors(*ab) for name, ab in lora.items()})
        return [output, *torch.autograd.grad(output.float().pow(2).mean() / 100, inputs)]

    wanted = run()
    module.bfloat16()
    for name in lora:
        getattr(module, name).quant_state.dtype = compute_dtype
    for mine, its in zip(run(), wanted, strict=True):
        torch.testing.assert_close(mine.float(), its.float(), rtol=0, atol=0.1 * its.abs().max().item())


def test_a_token_that_overflows_in_experts_that_it_does_not_go_to_harms_nobody(monkeypatch):
    """The first token would be infinite in the others: were it what gaps read, their gradients would be NaN."""
    monkeypatch.setattr(forward_of_experts, "work_sizes", lambda device: on_gpu())
    module = build_experts()
    module.gate_up_proj[0] *= 1e-3
    module.gate_up_proj[1:] *= 1e3
    module, lora = module.half(), {}
    for name, ab in build_lora(module).items():
        lora[name] = [(tensor.detach() * 1e-3).half().requires_grad_() for tensor in ab]
    x = torch.cat([torch.full((1, HIDDEN), 1e4), torch.randn(6, HIDDEN) * 1e-3]).half().requires_grad_()
    index = torch.tensor([[0], [1], [2], [3], [4], [1], [1]])
    weights = torch.ones(index.shape).half().requires_grad_()
    output = experts_forward(module, x, index, weights, {name: factors(*ab) for name, ab in lora.items()})
    assert output.isfinite().all()
    output[1:].sum().backward()
    assert all(tensor.grad.isfinite().all() for ab in lora.values() for tensor in ab)


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_experts_that_are_trained_themselves(flags):
    """Through `grouped_mm` and autograd, which is also the way of frozen ones where that is one kernel."""
    module = build_experts(**flags)
    module.requires_grad_(True)
    lora = build_lora(module)
    index = torch.tensor(ROUTINGS["mixed, one expert empty"])
    x, weights = torch.randn(len(index), HIDDEN, requires_grad=True), torch.rand(index.shape, requires_grad=True)

    def with_delta(name, A, B):
        delta = reference.expert_deltas(A, B, NUM_EXPERTS, 0.5)
        return getattr(module, name) + (delta.transpose(1, 2) if module.is_transposed else delta)

    got = experts_forward(module, x, index, weights, expert_lora={name: factors(*ab) for name, ab in lora.items()})
    wanted = reference.experts(module, x, index, weights, {name: with_delta(name, *ab) for name, ab in lora.items()})
    used = [p for name, p in module.named_parameters() if "norm" not in name or module.has_post_expert_norm]
    inputs = [x, weights, *used, *(tensor for ab in lora.values() for tensor in ab)]
    direction = torch.randn_like(wanted)
    for mine, true in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_without_an_adapter_the_bits_are_those_of_grouped_mm(tokens, dtype):
    module = build_experts().to(dtype)
    index = torch.rand(tokens, NUM_EXPERTS).topk(2).indices
    x, weights = torch.randn(tokens, HIDDEN, dtype=dtype), torch.rand(tokens, 2, dtype=dtype)
    wanted = grouped_mm_experts_forward(module, x, index, weights)
    assert torch.equal(experts_forward(module, x, index, weights), wanted)


def test_autocast_leaves_the_dtype_of_the_weights():
    module = build_experts()
    lora = {name: factors(*ab) for name, ab in build_lora(module).items()}
    index, weights, x = torch.tensor([[0, 1]]), torch.rand(1, 2), torch.randn(1, HIDDEN, requires_grad=True)
    wanted = experts_forward(module, x, index, weights, expert_lora=lora)
    with torch.autocast("cpu", torch.bfloat16):
        got = experts_forward(module, x, index, weights, expert_lora=lora)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant):
    module, index = build_experts(), torch.tensor([[0, 1], [1, 2], [2, 3]])
    lora, x, weights = build_lora(module), torch.randn(3, HIDDEN, requires_grad=True), torch.rand(3, 2)

    def run(x):
        return experts_forward(module, x, index, weights, {name: factors(*ab) for name, ab in lora.items()})

    inputs = [x, *(tensor for ab in lora.values() for tensor in ab)]
    results = []
    for output in (run(x), checkpoint(run, x, use_reentrant=reentrant)):
        for tensor in inputs:
            tensor.grad = None
        output.pow(2).sum().backward()
        results.append([tensor.grad for tensor in inputs])
    assert all(map(torch.equal, *results))


def test_compiled_experts_compute_the_same():
    module, index = build_experts(), torch.tensor([[0, 1], [1, 2], [2, 3]])
    lora, x, weights = build_lora(module), torch.randn(3, HIDDEN, requires_grad=True), torch.rand(3, 2)

    def run(x):
        return experts_forward(module, x, index, weights, {name: factors(*ab) for name, ab in lora.items()}) * 2

    compiled = torch.compile(run, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    gradients = [torch.autograd.grad(function(x).pow(2).sum(), x)[0] for function in (compiled, run)]
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="lays rows out by expert on the host"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(x)


def test_two_adapters_add_up():
    module = build_experts()
    one, two = build_lora(module), build_lora(module)
    index, x, weights = torch.tensor([[0, 1]]), torch.randn(1, HIDDEN), torch.rand(1, 2)
    both = {name: factors(*one[name]) + factors(*two[name], scaling=2.0) for name in one}
    summed = {
        name: getattr(module, name)
        + reference.expert_deltas(*one[name], NUM_EXPERTS, 0.5)
        + reference.expert_deltas(*two[name], NUM_EXPERTS, 2.0)
        for name in one
    }
    got = experts_forward(module, x, index, weights, expert_lora=both)
    torch.testing.assert_close(got, reference.experts(module, x, index, weights, summed), rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_dtype_of_the_activations():
    module = build_experts().to(torch.bfloat16)
    x = torch.randn(4, HIDDEN, dtype=torch.bfloat16)
    index, weights = torch.tensor([[0, 1], [1, 2], [3, 4], [0, 4]]), torch.rand(4, 2, dtype=torch.bfloat16)
    lora = {name: factors(*ab) for name, ab in build_lora(module).items()}
    got = experts_forward(module, x, index, weights, expert_lora=lora)
    assert got.dtype == torch.bfloat16
    exact = experts_forward(module.float(), x.float(), index, weights.float(), expert_lora=lora)
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
