"""A plain LoRA adapter of another tool becomes an OrdMoE adapter that computes what it meant."""

import json
import math
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ordmoe_peft.adapter.targets import find_targets
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel, parameter_of
from ordmoe_peft.tools.imports.convert import import_adapter
from tests import models


E, H, F, R = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH, 3
BUILDERS = {
    "qwen3_moe": models.qwen3_moe,
    "gpt_oss": models.gpt_oss,  # stored as (E, I, O), gate and up by turns
    "openai_privacy_filter": models.openai_privacy_filter,  # (E, I, O), gate and up side by side
    "nemotron_h": models.nemotron_h,  # no gate
}


def draw(*shape):
    return torch.randn(shape) * 0.3  # from the seed that each test begins with


def write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    default = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": ["experts"]}
    (folder / "adapter_config.json").write_text(json.dumps(default | settings))
    save_file(
        {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def base(model, folder):
    model.config.save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    return str(folder / "base")


def imported(model, source, folder, **options):
    """The model with the imported adapter, and what was said of it."""
    report = import_adapter(source, folder / "imported", base(model, folder), **options)
    return PeftModel.from_pretrained(model, folder / "imported").eval(), report


def outputs(model):
    with torch.no_grad():
        return model(**models.text_batch()).logits


def add_(model, deltas):
    """Add updates (E, O, I) or (O, I) to the weights of a model, in their own layout."""
    for name, delta in deltas.items():
        weight = parameter_of(model, name)
        weight.data += delta if weight.shape == delta.shape else delta.transpose(-1, -2)
    return model.eval()


def stacks(model):
    """Each expert stack with its name, the name of its module, whether it is the inner one, and (E, O, I)."""
    for layer in MoEModel.of(model).layers:
        for place, (name, stack) in enumerate(layer.stacks.items()):
            rows, columns = stack.shape[1:]
            sides = (columns, rows) if layer.experts.is_transposed else (rows, columns)
            yield f"{layer.experts_name}.{name}", layer.experts_name + (".base_layer" if place == 0 else ""), sides


def fused_file(model, is_reversed, is_slowest):
    """Random factors in a layout, written out here once more, and the updates that they mean."""
    tensors, deltas = {}, {}
    for name, module, (out, into) in stacks(model):
        a_side, b_side = (out, into) if is_reversed else (into, out)
        A, B = draw(E * R, a_side), draw(b_side, R * E)
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = A, B
        order = "o e r" if is_slowest else "o r e"
        B = B.reshape(b_side, E, R) if is_slowest else B.reshape(b_side, R, E)
        delta = torch.einsum(f"{order}, e r i -> e o i", B, A.reshape(E, R, a_side)) * 6 / R
        deltas[name] = delta.transpose(1, 2) if is_reversed else delta
    return tensors, deltas


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    ("layout", "is_reversed", "is_slowest", "settings"),
    [
        ("auto", False, False, {}),
        ("peft", False, False, {}),
        ("auto", True, False, {}),
        ("auto", False, True, {"lora_B_layout": "grouped_by_expert"}),
        ("unsloth", True, True, {}),
    ],
)
def test_fused_layouts(family, layout, is_reversed, is_slowest, settings, tmp_path):
    tensors, deltas = fused_file(BUILDERS[family](), is_reversed, is_slowest)
    source = write(tmp_path / "source", tensors, **settings)
    tuned, report = imported(BUILDERS[family](), source, tmp_path, source_layout=layout)
    torch.testing.assert_close(outputs(tuned), outputs(add_(BUILDERS[family](), deltas)), rtol=1e-4, atol=1e-4)
    assert report.layout == ("unsloth" if is_slowest else "peft-0.18" if is_reversed else "peft")
    assert (report.targets, report.rank, report.filled) == (["experts"], R, 0)


def test_peft_0_18_is_reversed_where_stacks_are_stored_out_first(tmp_path):
    """Shapes agree with either reading where 2 F = H; then the version, or the option, says."""
    square = {"moe_intermediate_size": H // 2}
    tensors, deltas = fused_file(models.qwen3_moe(**square), is_reversed=True, is_slowest=False)
    only = {name: tensor for name, tensor in tensors.items() if ".base_layer." in name}
    only = {name.replace(".base_layer", ""): tensor for name, tensor in only.items()}
    deltas = {name: delta for name, delta in deltas.items() if name.endswith("gate_up_proj")}
    named = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    source = write(tmp_path / "source", only, **named)
    with pytest.raises(OrdMoEConfigError, match="fit the experts both ways round.*--source_layout peft .*peft-0.18"):
        imported(models.qwen3_moe(**square), source, tmp_path)
    expected = outputs(add_(models.qwen3_moe(**square), deltas))
    for number, (options, settings) in enumerate(
        [({"source_layout": "peft-0.18"}, {}), ({}, {"peft_version": "0.18.1"}), ({}, {"peft_version": "0.19.0"})]
    ):
        source = write(tmp_path / "source", only, **named, **settings)
        (tmp_path / str(number)).mkdir()
        tuned, report = imported(models.qwen3_moe(**square), source, tmp_path / str(number), **options)
        assert (report.layout, report.filled) == ("peft-0.18", models.NUM_LAYERS)
        torch.testing.assert_close(outputs(tuned), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("shares_A", [True, False])
def test_keys_for_each_expert(family, shares_A, tmp_path):
    """Of different ranks; some experts have none, and one projection of one layer."""
    model = BUILDERS[family]()
    tensors, deltas, ranks = {}, {}, {}
    for layer in MoEModel.of(model).layers:
        up, down = layer.projections
        has_gate, turns = layer.experts.has_gate, family == "gpt_oss"
        wide = torch.zeros(E, 2 * F if has_gate else F, H)
        narrow = torch.zeros(E, H, F)
        for expert in range(0, E, 2):
            rank = 1 + expert % 3
            shared = draw(rank, H)
            for part in ["gate_proj", "up_proj"][not has_gate :] + (["down_proj"] if layer.index else []):
                into, out = (F, H) if part == "down_proj" else (H, F)
                A = shared if shares_A and part != "down_proj" else draw(rank, into)
                B = draw(out, rank)
                ranks[f"experts.{expert}.{part}"] = rank
                tensors[f"{layer.experts_name}.{expert}.{part}.lora_A"] = A.clone()
                tensors[f"{layer.experts_name}.{expert}.{part}.lora_B"] = B
                delta = B @ A * 6 / rank
                if part == "down_proj":
                    narrow[expert] = delta
                elif not has_gate:
                    wide[expert] = delta
                elif turns:
                    wide[expert][part == "up_proj" :: 2] = delta
                else:
                    wide[expert].view(2, F, H)[int(part == "up_proj")] = delta
        deltas |= {f"{layer.experts_name}.{up}": wide, f"{layer.experts_name}.{down}": narrow}
    tuned, report = imported(model, write(tmp_path / "source", tensors, rank_pattern=ranks), tmp_path)
    torch.testing.assert_close(outputs(tuned), outputs(add_(BUILDERS[family](), deltas)), rtol=1e-4, atol=1e-4)
    doubled = family != "nemotron_h" and not shares_A
    assert (report.layout, report.filled, report.rank) == ("per-expert", 1, 6 if doubled else 3)


def test_names_of_transformers_4(tmp_path):
    """Mixtral's experts were `block_sparse_moe.experts.0.w1`."""
    name = "model.layers.1.block_sparse_moe.experts.3"
    A, B = draw(R, H), draw(F, R)
    source = write(tmp_path / "source", {f"{name}.w3.lora_A": A, f"{name}.w3.lora_B": B})
    tuned, report = imported(models.mixtral(), source, tmp_path)
    delta = torch.zeros(E, 2 * F, H)
    delta[3, F:] = B @ A * 6 / R
    expected = outputs(add_(models.mixtral(), {"model.layers.1.mlp.experts.gate_up_proj": delta}))
    torch.testing.assert_close(outputs(tuned), expected, rtol=1e-4, atol=1e-4)
    assert report.adapted == 1


def test_plain_peft_with_patterns_and_rslora_on_all_roles(tmp_path):
    """What PEFT of this environment saves; two of four attention matrices, a pattern of ranks and one of alphas."""
    targets = find_targets(models.qwen3_moe())
    plain = get_peft_model(
        models.qwen3_moe(),
        LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "v_proj"],
            target_parameters=[target.name for target in targets if target.is_parameter],
            rank_pattern={"down_proj": 2, "mlp.gate.weight": 1},
            alpha_pattern={"gate_up_proj": 9, "q_proj": 7},
        ),
    ).eval()
    models.randomize_adapter(plain)
    plain.save_pretrained(tmp_path / "source")
    tuned, report = imported(models.qwen3_moe(), tmp_path / "source", tmp_path)
    torch.testing.assert_close(outputs(tuned), outputs(plain), rtol=1e-4, atol=1e-4)
    assert report.targets == ["router", "experts", "attention"] and report.filled == 2 * models.NUM_LAYERS
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.num_tiers) == (3, 3, 1)


def test_scalings_that_agree_stay_as_they_are(tmp_path):
    tensors, _ = fused_file(models.qwen3_moe(), False, False)
    tuned, _ = imported(models.qwen3_moe(), write(tmp_path / "source", tensors), tmp_path)
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha) == (R, 6)
    after = load_file(tmp_path / "imported" / "adapter_model.safetensors")
    assert after.keys() == {f"base_model.model.{name}.weight" for name in tensors}
    assert all(torch.equal(after[f"base_model.model.{name}.weight"], tensor) for name, tensor in tensors.items())


def test_scalings_that_differ_lose_nothing_of_16_bits(tmp_path):
    name = "model.layers.0.self_attn"
    sides = {"q_proj": 64, "v_proj": 32}
    tensors = {f"{name}.{part}.lora_A": draw(R, H).to(torch.float16) for part in sides}
    tensors |= {f"{name}.{part}.lora_B": (draw(side, R) * 1e3).to(torch.float16) for part, side in sides.items()}
    source = write(tmp_path / "source", tensors, lora_alpha=400, alpha_pattern={"q_proj": 5})
    imported(models.qwen3_moe(), source, tmp_path)
    after = load_file(tmp_path / "imported" / "adapter_model.safetensors")
    for part, alpha in {"q_proj": 5, "v_proj": 400}.items():
        B = tensors[f"{name}.{part}.lora_B"].float() * (alpha / R)
        assert torch.equal(after[f"base_model.model.{name}.{part}.lora_B.weight"], B)


def test_patterns_of_a_router_that_peft_has_as_a_parameter(tmp_path):
    """PEFT matches them with `mlp.gate.weight` alone: the first is of nothing."""
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=["mlp.gate.weight"],
        alpha_pattern={"mlp.gate": 32, r"layers.1.mlp.gate.weight": 9},
    )
    plain = get_peft_model(models.qwen3_moe(), config).eval()
    models.randomize_adapter(plain)
    plain.save_pretrained(tmp_path / "source")
    tuned, _ = imported(models.qwen3_moe(), tmp_path / "source", tmp_path)
    torch.testing.assert_close(outputs(tuned), outputs(plain), rtol=1e-4, atol=1e-4)


def test_a_folder_with_the_bases_weights_is_known_again(tmp_path):
    tensors, _ = fused_file(models.qwen3_moe(), False, False)
    source = write(tmp_path / "source", tensors)
    models.qwen3_moe().save_pretrained(tmp_path / "weights")
    import_adapter(source, tmp_path / "imported", str(tmp_path / "weights"))
    PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "imported")
    other = models.qwen3_moe()
    other.model.layers[0].mlp.gate.weight.data.add_(1)
    with pytest.raises(OrdMoEModelError, match="its (routers|embeddings) have other weights"):
        PeftModel.from_pretrained(other, tmp_path / "imported")


def broken(change):
    """A file of PEFT's with one thing changed."""
    tensors, _ = fused_file(models.qwen3_moe(), False, False)
    settings: dict = {}
    change(tensors, settings)
    return tensors, settings


EXPERTS = "model.layers.0.mlp.experts"
WRONG = {
    "is none of LoRA's two factors": lambda t, s: t.update({"lm_head": draw(2, 2)}),
    "without the other": lambda t, s: t.pop(f"{EXPERTS}.lora_B"),
    "no matrix of finite numbers": lambda t, s: t[f"{EXPERTS}.lora_B"].fill_(math.nan),
    "are no factors of 8 experts": lambda t, s: t.update({f"{EXPERTS}.lora_A": draw(E * R, F + 1)}),
    "does not have, or which no role": lambda t, s: t.update({"a.lora_A": draw(1, 2), "a.lora_B": draw(2, 1)}),
    "keys of whole stacks": lambda t, s: t.update(
        {f"{EXPERTS}.0.up_proj.lora_A": draw(R, H), f"{EXPERTS}.0.up_proj.lora_B": draw(F, R)}
    ),
    "has rank 3 in the file, and 4 by r": lambda t, s: s.update(r=4),
    "has use_dora=True": lambda t, s: s.update(use_dora=True),
    "holds a IA3 adapter": lambda t, s: s.update(peft_type="IA3"),
    "lora_alpha=None, not a number": lambda t, s: s.update(lora_alpha=None),
    "--source_layout unsloth for one trained": lambda t, s: s.update(base_model_name_or_path="unsloth/Qwen3"),
    "known are": lambda t, s: s.update(lora_B_layout="other"),
    "init_lora_weights='pissa', with which PEFT changes the base": lambda t, s: s.update(init_lora_weights="pissa"),
    "has alora_invocation_tokens=[5]": lambda t, s: s.update(alora_invocation_tokens=[5]),
    "lora_alpha=nan, not a number": lambda t, s: s.update(lora_alpha=math.nan),
    "lora_alpha=True, not a number": lambda t, s: s.update(lora_alpha=True),
    "alpha_pattern['experts']='8', not a number": lambda t, s: s.update(alpha_pattern={"experts": "8"}),
    "no mapping of patterns": lambda t, s: s.update(rank_pattern={"(": 3}),
    "use_rslora='false', not true or false": lambda t, s: s.update(use_rslora="false"),
    "no LoRA on model.layers.2.mlp.experts.gate_up_proj": lambda t, s: (
        s.update(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        [t.pop(name) for name in list(t) if "layers.2.mlp.experts.base_layer" in name],
    ),
    "has no tensors": lambda t, s: t.clear(),
    "experts.0.w3, which are one place": lambda t, s: (
        t.clear(),
        t.update({f"{EXPERTS}.0.{part}.lora_A": draw(R, H) for part in ("up_proj", "w3")}),
        t.update({f"{EXPERTS}.0.{part}.lora_B": draw(F, R) for part in ("up_proj", "w3")}),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_right_is_refused(message, tmp_path):
    tensors, settings = broken(WRONG[message])
    source = write(tmp_path / "source", tensors, **settings)
    with pytest.raises((OrdMoEConfigError, OrdMoEModelError), match=re.escape(message)):
        imported(models.qwen3_moe(), source, tmp_path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("layout", ["per-expert", "peft-0.18", "unsloth"])
def test_a_layout_that_the_file_does_not_have(layout, tmp_path):
    tensors, _ = fused_file(models.qwen3_moe(), False, False)
    source = write(tmp_path / "source", tensors, lora_B_layout="rank_major")
    with pytest.raises(OrdMoEConfigError, match=r"source_layout='.*Pass 'auto'|Pass 'auto'"):
        imported(models.qwen3_moe(), source, tmp_path, source_layout=layout)


def test_experts_that_the_base_does_not_have(tmp_path):
    name = f"{EXPERTS}.{E}.up_proj"
    source = write(tmp_path / "source", {f"{name}.lora_A": draw(1, H), f"{name}.lora_B": draw(F, 1)})
    with pytest.raises(OrdMoEModelError, match="experts.8.up_proj, which the base does not have"):
        imported(models.qwen3_moe(), source, tmp_path)


def test_pickle_files_are_not_read(tmp_path):
    source = write(tmp_path / "source", {"x": draw(1, 1)})
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(OrdMoEConfigError, match=r"\['adapter_model.bin'\]; pickle files are not read"):
        import_adapter(source, tmp_path / "out", "unread")
    with pytest.raises(OrdMoEConfigError, match="source_layout must be one of"):
        import_adapter(source, tmp_path / "out", "unread", source_layout="axolotl")
