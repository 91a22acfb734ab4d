"""Experts outside transformers' interface, in models that bring their own code: the kinds of MoE that the Hub has.

What a layer should do is computed here from the model's own weights, by what `tiny_moe/modeling_tiny_moe.py` says of
its layout, and by none of the package's code.
"""

import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from ordmoe import main
from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, tier_routing
from ordmoe_peft.adapter import model as model_module
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tiers.router_check import check_router
from ordmoe_peft.tools.export.plain_peft import export_plain_lora
from ordmoe_peft.training import router_health
from tests import models, reference, text
from tests.families.subject import relative_error
from tests.test_ordmoe import error_of, save_base, save_data, train_arguments


LAYOUTS = ["mixtral", "deepseek", "rows", "stacks"]
OF_MODULES = [layout for layout in LAYOUTS if layout != "stacks"]
E, K, C = 8, 2, 3
TIERS = [1, 2, 3]


@pytest.fixture
def load(folder_of):
    def load(layout: str, **options):
        return AutoModelForCausalLM.from_pretrained(folder_of(layout), trust_remote_code=True, **options).eval()

    return load


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture
def model(load, layout):
    return load(layout).requires_grad_(False)


BATCH = models.text_batch()


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or BATCH)).logits


def blocks(model) -> dict[int, nn.Module]:
    """The blocks that route among experts, by decoder layer."""
    return {
        index: layer.mlp
        for index, layer in enumerate(model.get_submodule("model.layers"))
        if hasattr(layer.mlp, "experts")
    }


# ---------------------------------------------------------------------------------------------- what layers should do
def scores_of(block: nn.Module, layout: str, hidden_TH: torch.Tensor) -> torch.Tensor:
    """What the router of a layout ranks experts by (`torch.Tensor` of shape `(T, E)`)."""
    logits_TE = nn.functional.linear(hidden_TH, block.gate.weight, getattr(block.gate, "bias", None))
    return logits_TE.softmax(-1) if layout in ("mixtral", "deepseek") else logits_TE.sigmoid()


def expert_output(block: nn.Module, layout: str, expert: int, hidden_H: torch.Tensor) -> torch.Tensor:
    if layout == "stacks":
        gate, up = (block.experts.gate_up_proj[expert] @ hidden_H).chunk(2)
        return block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
    module = block.experts[expert]
    names = ("w1", "w3", "w2") if layout == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (getattr(module, name).weight for name in names)
    return down @ (nn.functional.silu(gate @ hidden_H) * (up @ hidden_H))


def block_output(block: nn.Module, layout: str, hidden_BSH: torch.Tensor, tiers: list[int]) -> torch.Tensor:
    """Each token with the experts of its row's tier and the weights that its router gives them."""
    rows, length, _ = hidden_BSH.shape
    of_row, hidden_TH = tiers * (rows // len(tiers)), hidden_BSH.flatten(0, 1)
    outputs = []
    for token, scores_E in enumerate(scores_of(block, layout, hidden_TH)):
        ranked = scores_E.argsort(descending=True)
        ranks = reference.tier_ranks(of_row[token // length], C, E, K, "uniform")
        chosen = [int(ranked[rank - 1]) for rank in ranks]
        weights_K = scores_E[chosen]
        if layout in ("mixtral", "stacks"):
            weights_K = weights_K / weights_K.sum()
        hidden_H = hidden_TH[token]
        outputs.append(
            sum(w * expert_output(block, layout, e, hidden_H) for w, e in zip(weights_K, chosen, strict=True))
        )
    output = torch.stack(outputs).view_as(hidden_BSH)
    return output + block.shared_experts(hidden_BSH) if layout == "deepseek" else output


@contextmanager
def watched_blocks(model) -> Iterator[list[tuple[nn.Module, torch.Tensor, torch.Tensor]]]:
    """Each call of each block: the block, the states that it was given and those that it returned."""
    calls, handles = [], []

    def watch(block, args, output):
        calls.append((block, args[0], output[0] if isinstance(output, tuple) else output))

    for block in blocks(model).values():
        handles.append(block.register_forward_hook(watch))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def check_blocks(calls, layout: str, tiers: list[int]) -> None:
    for block, hidden_BSH, output_BSH in calls:
        torch.testing.assert_close(output_BSH, block_output(block, layout, hidden_BSH, tiers), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- tiers
def test_layers_experts_and_k_are_found(model, layout):
    layers = MoEModel.of(model).layers
    found = blocks(model)
    assert [layer.decoder_layer for layer in layers] == [*found] == ([1, 2] if layout == "deepseek" else [0, 1, 2])
    for layer, block in zip(layers, found.values(), strict=True):
        assert layer.router is block.gate and layer.experts is block.experts
        assert layer.router_weight is block.gate.weight
        assert layer.kind == ("stacks" if layout == "stacks" else "modules")
        assert layer.projections == (("gate_up_proj", "down_proj") if layout == "stacks" else ())
        sizes = check_router(layer)
        assert (layer.num_experts, sizes.num_experts, sizes.top_k) == (E, E, K)
        assert sizes.router_in_block == ("gate" if layout in ("mixtral", "rows") else "")


def test_tier_1_is_the_model(model):
    plain = logits(model)
    with tier_routing(model, 1):
        assert torch.equal(logits(model), plain)
    with tier_routing(model, [1, 1, 3]):
        assert relative_error(logits(model)[:2], plain[:2]) < 1e-5
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("tiers", [[2], [3], TIERS], ids=str)
def test_tiers_are_the_routers_own_ranks(model, layout, tiers):
    plain = logits(model)
    with tier_routing(model, tiers if len(tiers) > 1 else tiers[0]), watched_blocks(model) as calls:
        held = logits(model)
    assert len(calls) == len(blocks(model))
    check_blocks(calls, layout, tiers)
    assert relative_error(held[1:], plain[1:]) > 1e-2


def test_tiers_are_held_while_decoding(model, layout):
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with tier_routing(model, TIERS), watched_blocks(model) as calls:
        out = model.generate(**BATCH, **settings, output_logits=True, return_dict_in_generate=True)
    num_layers = len(blocks(model))
    assert [hidden.shape[1] for _, hidden, _ in calls] == [7] * num_layers + [1] * 2 * num_layers
    check_blocks(calls, layout, TIERS)
    longer = {
        "input_ids": out.sequences[:, :-1],
        "attention_mask": nn.functional.pad(BATCH["attention_mask"], (0, 2), value=1),
    }
    with tier_routing(model, TIERS):
        whole = logits(model, **longer)[:, -3:]
    assert relative_error(torch.stack(out.logits, dim=1), whole) < 1e-4


# --------------------------------------------------------------------------------------------------------------- LoRA
def adapted(model, random: bool = True, **settings) -> PeftModel:
    """With an adapter whose alpha / r is no power of two, which would make sums exact by luck."""
    torch.manual_seed(3)
    peft_model = get_peft_model(model, OrdMoEConfig(r=4, lora_alpha=6, **settings)).eval()
    if random:
        models.randomize_adapter(peft_model)
    return peft_model


def gradients(model, tiers: list[int] | None) -> dict[str, torch.Tensor]:
    """The factors' gradients of a random sum of logits, by name."""
    model.zero_grad()
    model.train()
    with tier_routing(model, tiers) if tiers else nullcontext():
        output = model(**BATCH, use_cache=False).logits
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    model.eval()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_an_adapter_covers_routers_and_experts_and_changes_nothing_at_first(model, layout):
    plain, num_layers = logits(model), len(blocks(model))
    peft_model = adapted(model, random=False)
    assert relative_error(logits(peft_model), plain) < 1e-5
    factors = [name for name, _ in peft_model.named_parameters() if "lora_A" in name]
    per_layer = 3 if layout == "stacks" else 1 + 3 * E
    assert len(factors) == num_layers * per_layer


def test_logits_and_gradients_are_those_of_peft(model, layout):
    plain_logits, peft_model = logits(model), adapted(copy.deepcopy(model), expert_rank="r/K")
    config = peft_model.peft_config["default"]
    assert relative_error(logits(peft_model), plain_logits) > 1e-2
    assert set(config.rank_pattern.values()) == {4 // K} and len(config.rank_pattern) <= 3 * len(blocks(model))
    fields = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern")
    plain = get_peft_model(model, LoraConfig(**{name: getattr(config, name) for name in fields})).eval()
    ours = {name: weight for name, weight in peft_model.named_parameters() if "lora_" in name}
    theirs = {name: weight for name, weight in plain.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, weight in theirs.items():
            weight.copy_(ours[name])
    assert relative_error(logits(peft_model), logits(plain)) < 1e-5
    wanted, got = gradients(plain, None), gradients(peft_model, None)
    assert wanted.keys() == got.keys()
    for name, gradient in got.items():
        assert relative_error(gradient, wanted[name]) < 1e-3, name


def test_every_factor_that_tokens_reach_has_a_gradient(model, layout):
    peft_model = adapted(model)
    with watched_blocks(model) as calls:
        found = gradients(peft_model, TIERS)
    for index, (block, hidden_BSH, _) in zip(blocks(model), calls, strict=True):
        reached = set()
        with torch.no_grad():
            ranked_TE = scores_of(_merged_gate(block), layout, hidden_BSH.flatten(0, 1)).argsort(descending=True)
        for token, ranked in enumerate(ranked_TE.tolist()):
            ranks = reference.tier_ranks(TIERS[token // hidden_BSH.shape[1]], C, E, K, "uniform")
            reached |= {ranked[rank - 1] for rank in ranks}
        assert len(reached) > 1
        of_layer = {name: grad for name, grad in found.items() if f".layers.{index}." in name}
        assert all(grad.isfinite().all() for grad in of_layer.values())
        assert all(grad.any() for name, grad in of_layer.items() if ".gate." in name)
        assert reached == _experts_with_gradient(of_layer, layout)


def _merged_gate(block: nn.Module) -> SimpleNamespace:
    """A block with a gate whose weight holds the adapter's delta."""
    gate = block.gate
    base = gate.base_layer if hasattr(gate, "base_layer") else gate
    weight = base.weight + gate.get_delta_weight("default")
    return SimpleNamespace(gate=SimpleNamespace(weight=weight, bias=getattr(base, "bias", None)))


def _experts_with_gradient(of_layer: dict[str, torch.Tensor], layout: str) -> set[int]:
    """The experts of which each factor of each projection has a gradient."""
    by_factor: dict[str, set[int]] = {}
    for name, grad in of_layer.items():
        if ".experts." not in name or "shared" in name:
            continue
        if layout == "stacks":  # PEFT's layout: row e·r + k of A, column k·E + e of B
            of_expert = grad.view(E, -1) if "lora_A" in name else grad.view(len(grad), -1, E).permute(2, 0, 1)
            by_factor[name] = {e for e in range(E) if of_expert[e].any()}
        else:
            expert, _, factor = name.partition(".experts.")[2].partition(".")
            by_factor.setdefault(factor, set())
            if grad.any():
                by_factor[factor].add(int(expert))
    assert len(by_factor) == (4 if layout == "stacks" else 6)
    first, *others = by_factor.values()
    assert all(other == first for other in others), by_factor
    return first


def test_gradients_are_the_same_with_checkpointing(model):
    peft_model = adapted(model)
    wanted = gradients(peft_model, TIERS)
    peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    handle = next(iter(blocks(model).values())).register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(peft_model, TIERS)
    handle.remove()
    assert len(runs) == 2  # again in backward
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative_error(got[name], gradient) < 1e-3, name


def test_a_router_is_judged_alike_with_lora_on_it(model):
    """Also when another adapter comes, on the router or in it."""
    wanted = [check_router(layer) for layer in MoEModel.of(model).layers]
    peft_model = adapted(model)
    assert [check_router(layer) for layer in MoEModel.of(model).layers] == wanted
    before = logits(peft_model)
    peft_model.add_adapter("second", OrdMoEConfig(r=2, num_tiers=2))
    assert torch.equal(logits(peft_model), before)
    peft_model.set_adapter("second")
    with peft_model.disable_adapter():
        base = logits(peft_model)
    assert relative_error(logits(peft_model), base) < 1e-5


def test_merged_logits_are_the_adapters(model):
    peft_model = adapted(model)
    wanted = logits(peft_model)
    assert relative_error(logits(peft_model.merge_and_unload()), wanted) < 1e-4


def test_stacks_outside_the_interface_are_slower_and_say_so_once(load, monkeypatch):
    said = []
    monkeypatch.setattr(model_module.logger, "warning_once", said.append)
    for layout in LAYOUTS:
        adapted(load(layout))
    (message,) = said
    assert message.startswith("StackedExperts: not of transformers' experts interface")


def test_a_new_process_reads_what_was_saved(load, folder_of, code_cache, tmp_path):
    """With plain PEFT first, and then with this package, held to tiers."""
    for layout in LAYOUTS:
        peft_model = adapted(load(layout))
        peft_model.save_pretrained(tmp_path / layout / "adapter")
        export_plain_lora(tmp_path / layout / "adapter", tmp_path / layout / "plain")
        with tier_routing(peft_model, TIERS):
            held = logits(peft_model)
        torch.save((folder_of(layout), logits(peft_model), held), tmp_path / layout / "expected.pt")
    torch.save(BATCH, tmp_path / "batch.pt")
    script = f"""
        import sys, torch
        from pathlib import Path
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        folder, layouts = Path({str(tmp_path)!r}), {LAYOUTS!r}
        batch = torch.load(folder / "batch.pt")

        def loaded(layout, name):
            expected = torch.load(folder / layout / "expected.pt", weights_only=False)
            base = AutoModelForCausalLM.from_pretrained(expected[0], trust_remote_code=True).eval()
            return PeftModel.from_pretrained(base, folder / layout / name), *expected[1:]

        for layout in layouts:
            model, expected, held = loaded(layout, "plain")
            assert "ordmoe_peft" not in sys.modules
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        from ordmoe_peft import tier_routing
        for layout in layouts:
            model, expected, held = loaded(layout, "adapter")
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
                with tier_routing(model, {TIERS}):
                    torch.testing.assert_close(model(**batch).logits, held, rtol=1e-4, atol=1e-5)
    """
    environment = os.environ | {"HF_MODULES_CACHE": str(code_cache)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------------------- 4 bits
def test_experts_in_4_bits(load, layout):
    """Linear layers by bitsandbytes' own, stacks by ours; routers keep their dtype, and all comes back."""
    before = dict(load(layout).named_parameters())
    model = load(layout, quantization_config=MoeBitsAndBytesConfig())
    block = blocks(model)[2]
    if layout == "stacks":
        assert block.experts.gate_up_proj.dtype == torch.uint8
    else:
        packed = [module for module in block.experts.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(packed) == 3 * E
    assert block.gate.weight.dtype == torch.float32
    packed_logits = logits(model)
    dense = model.dequantize()
    assert relative_error(logits(dense), packed_logits) < 1e-3
    for name, weight in dense.named_parameters():
        assert (weight - before[name]).norm() <= 0.2 * before[name].norm(), name
        if ".experts." in name and "shared" not in name:
            assert not torch.equal(weight, before[name])


def test_an_adapter_trains_in_4_bits(load, layout):
    model = load(layout, quantization_config=MoeBitsAndBytesConfig())
    packed_logits = logits(model)
    peft_model = adapted(model, random=False)
    assert relative_error(logits(peft_model), packed_logits) < 1e-5
    with tier_routing(peft_model, TIERS):
        assert relative_error(logits(peft_model)[1:], packed_logits[1:]) > 1e-2
    models.randomize_adapter(peft_model)
    found = gradients(peft_model, TIERS)
    assert all(grad.isfinite().all() for grad in found.values())
    for part in (".gate.", ".experts."):
        assert any(grad.any() for name, grad in found.items() if part in name)


# ----------------------------------------------------------------------------------------------------------- commands
def test_commands_run_on_remote_code(load, tmp_path, capsys, monkeypatch):
    """Also where a router gives scores alone, so that its health cannot be read, nor a balance loss made of it."""
    base, data, adapter = save_base(load("mixtral"), tmp_path / "base"), tmp_path / "data", tmp_path / "adapter"
    save_data(text.conversations(), data)
    training = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.01, "log_router_health": True}
    training["trust_remote_code"] = True
    assert "set --balance_coef 0" in error_of(capsys, train_arguments(base, data, adapter, **training))
    said = []
    monkeypatch.setattr(router_health.logger, "warning", said.append)
    assert main(train_arguments(base, data, adapter, balance_coef=0, overwrite_output_dir=True, **training)) == 0
    (message,) = said
    assert message.startswith("The health of 3 of 3 routers is not logged") and "mlp.gate (Linear)" in message
    history = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert not any(name.startswith("router/") for entry in history for name in entry)

    def run(command: str, **options) -> list | dict:
        shared = {"model_name_or_path": base, "dataset_name": data, "adapter": adapter, "trust_remote_code": True}
        options = shared | options | {"output_file": tmp_path / "results.json"}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        assert main([command, *arguments]) == 0
        return json.loads((tmp_path / "results.json").read_text())

    of_tiers = run("evaluate", tiers=3, max_new_tokens=2)
    assert of_tiers[0]["log_likelihood"] < 0
    capsys.readouterr()
    assert run("inspect", report=tmp_path / "inspection")["is_fit"] is False
    printed = " ".join(capsys.readouterr().out.split())
    assert "Whether 3 tiers (uniform) can be cut is not known: - Layer 0: " in printed
    assert "mlp.gate (Linear) does not return (logits, weights, experts)" in printed
    quality = run("tiers", max_new_tokens=1, limit=4, report=tmp_path / "report")
    assert (quality["num_samples"], len(quality["tiers"]), quality["diversity"]) == (4, C, [])
    printed = capsys.readouterr().out
    assert "all tiers in order" in printed
    assert "not measured" in printed and "does not return (logits, weights, experts)" in " ".join(printed.split())


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(("layout", "router"), [("twice", "TwiceRouter"), ("sort", "SortRouter")], indirect=["layout"])
@pytest.mark.parametrize("aspect", ["tiers", "lora"])
def test_routers_without_one_choice_are_refused_by_name(model, router, aspect):
    plain = logits(model)
    with pytest.raises(OrdMoEModelError, match=rf"model\.layers\.0\.mlp\.gate \({router}\)"):
        if aspect == "lora":
            get_peft_model(model, OrdMoEConfig(r=4))
        with tier_routing(model, 2):
            pass
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("layout", ["heads"], indirect=True)
def test_modules_that_all_run_are_no_experts(model):
    with pytest.raises(OrdMoEModelError, match="has no MoE layers"):
        get_peft_model(model, OrdMoEConfig(r=4))
    with pytest.raises(OrdMoEModelError, match="has no MoE layers"), tier_routing(model, 2):
        pass


@pytest.mark.parametrize("layout", ["mixed"], indirect=True)
@pytest.mark.parametrize("aspect", ["tiers", "lora"])
def test_a_mixture_of_all_its_experts_is_refused_by_name(model, aspect):
    """It has what a MoE has, but for a choice."""
    plain, modules = logits(model), list(model.named_modules())
    with pytest.raises(OrdMoEModelError, match=r"model\.layers\.0\.mlp\.mix \(Linear\) .* has no tiers"):
        if aspect == "lora":
            get_peft_model(model, OrdMoEConfig(r=4))
        with tier_routing(model, 2):
            pass
    assert torch.equal(logits(model), plain)
    assert list(model.named_modules()) == modules
