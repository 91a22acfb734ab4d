"""Every Mixture-of-Experts family of the installed transformers: what works does what it says, the rest is refused.

`pytest tests/families -k FAMILY` runs one. The table is in `rows.py`.
"""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, OrdMoEError, quantize_experts_, tier_routing
from ordmoe_peft.adapter.config import ROLES as ALL_ROLES
from ordmoe_peft.adapter.fitting import check_fits_model
from ordmoe_peft.errors import OrdMoEModelError, OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.monitoring.router_meter import RouterMeter
from ordmoe_peft.tools.export.plain_peft import export_plain_lora
from tests import reference
from tests.families import table, tiny
from tests.families.observed import observed, own_ranks
from tests.families.plain_peft import error_of_export, reader
from tests.families.rows import NO_FAMILY, ROWS, folders_with_experts, heads_in, installed_rows
from tests.families.subject import relative_error
from tests.families.tiny import WIDTH
from tests.models import randomize_adapter


C = 3
ROLES = ("router", "experts")


def works(*aspects: str):
    """The test's rows: those of which none of `aspects` is refused."""

    def parametrize(test):
        rows = [row for row in installed_rows() if not set(aspects) & set(row.refused)]
        marked = [
            pytest.param(
                row,
                id=row.id,
                marks=[pytest.mark.xfail(reason=row.upstream[test.__name__], strict=True)]
                if test.__name__ in row.upstream
                else [],
            )
            for row in rows
        ]
        return pytest.mark.parametrize("subject", marked, indirect=True, scope="module")(test)

    return parametrize


REFUSALS = [
    pytest.param(row, aspect, id=f"{row.id}-{aspect.replace(' ', '_')}")
    for row in installed_rows()
    for aspect in row.refused
    if aspect != "merging"
]


# ------------------------------------------------------------------------------------------------------------ the table
def test_every_family_has_a_row():
    with_rows = {row.name for row in ROWS} | {row.folder for row in installed_rows()} | set(NO_FAMILY)
    folders = folders_with_experts()
    missing = [name for folder in folders for name in (folder, *heads_in(folder)) if name not in with_rows]
    assert not missing, "add a row to tests/families/rows.py"


def test_every_row_has_a_family():
    installed = Version(transformers.__version__)
    gone = [row.name for row in ROWS if not row.is_installed and not Version(row.since or "0") > installed]
    assert not gone, "say in `since` which version has it first"


def test_the_table_is_of_these_rows(request):
    """The written table; `pytest tests/families --table docs/FAMILIES.md` writes it anew."""
    if request.config.getoption("--table", None):
        pytest.skip("it is being written")
    lines = (Path(__file__).parents[2] / "docs" / "FAMILIES.md").read_text().splitlines()
    assert [row.name for row in ROWS if not any(line.startswith(table.fixed_cells(row)) for line in lines)] == []


# -------------------------------------------------------------------------------------------------------- what is found
@works()
def test_layers_experts_and_k_are_found(subject, record_property):
    for name, fact in table.facts(subject.model).items():
        record_property(name, fact)
    if not subject.row.works:
        return
    layers = MoEModel.of(subject.model).all_layers
    assert sorted(layer.experts_name for layer in layers) == sorted(table.expert_names(subject.model))
    with observed(subject.model) as seen:
        subject.logits(subject.model)
    assert any(routed.index for routed in seen)
    for routed in seen:
        layer, stacks = routed.layer, list(routed.layer.stacks.values())
        held = max(map(len, stacks)) if stacks else len(list(layer.experts.children()))
        assert layer.num_experts == (len(stacks[0]) // WIDTH if layer.kind == "flat" else held)
        assert {index.shape[1] for index in routed.index} <= {routed.layer.top_k}


@pytest.mark.parametrize(("subject", "aspect"), REFUSALS, indirect=["subject"], scope="module")
def test_what_is_refused_is_refused_by_name(subject, aspect, record_property):
    model = subject.copy()
    modules, hooks = list(model.named_modules()), _hooks(model)
    with pytest.raises(OrdMoEError, match=subject.row.refused[aspect]) as refusal:
        if aspect == "tiers":
            with tier_routing(model, 2):
                pass
        elif aspect in ("lora", *ROLES):
            get_peft_model(model, OrdMoEConfig(r=4, targets=[aspect] if aspect in ROLES else list(ROLES)))
        else:
            quantize_experts_(model, MoeBitsAndBytesConfig())
    record_property(f"refused: {aspect}", str(refusal.value))
    assert [(name, type(module)) for name, module in model.named_modules()] == [(n, type(m)) for n, m in modules]
    assert _hooks(model) == hooks


def _hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------- tiers
@works("tiers")
def test_tier_1_is_the_model(subject):
    model = subject.copy()
    with tier_routing(model, 1):
        assert torch.equal(subject.logits(model), subject.plain)
    with tier_routing(model, [1, 1, 3]):
        assert relative_error(subject.logits(model)[:2], subject.plain[:2]) < 1e-4
    assert torch.equal(subject.logits(model), subject.plain)


@works("tiers")
@pytest.mark.parametrize("tier", [2, 3, [1, 2, 3]], ids=["tier_2", "tier_3", "mixed"])
def test_tiers_are_the_routers_own_ranks(subject, tier):
    model = subject.copy()
    with tier_routing(model, tier), observed(model) as seen:
        logits = subject.logits(model)
    assert logits.isfinite().all()
    assert relative_error(logits, subject.plain) > 1e-3
    check_ranks(seen, tier)


@works("tiers")
def test_tiers_are_held_while_decoding(subject):
    if not subject.model.can_generate() or "input_ids" not in subject.batch:
        pytest.skip("it does not generate from tokens")
    model, settings = subject.copy(), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    settings["suppress_tokens"] = list(range(tiny.FIRST_SPECIAL_TOKEN, tiny.VOCAB))  # else it draws images
    with tier_routing(model, [1, 2, 3]), observed(model) as seen, torch.no_grad():
        out = model.generate(**subject.batch, **settings, output_logits=True, return_dict_in_generate=True)
    check_ranks(seen, [1, 2, 3])
    if "canvas_length" in model.config.to_dict():
        return  # it does not write token after token
    # The prompt and two tokens after it; an encoder runs once, and so do experts for images.
    runs = {1, 3} if model.config.is_encoder_decoder or "moe_mm_token_type_ids" in subject.batch else {3}
    assert {len(routed.index) for routed in seen} - {0} == runs
    is_decoder = model.config.is_encoder_decoder
    longer = subject.batch | {"decoder_input_ids" if is_decoder else "input_ids": out.sequences[:, :-1]}
    padded = (("mm_token_type_ids", 0), ("moe_mm_token_type_ids", 0), ("attention_mask", 1))
    for name, value in () if is_decoder else padded:
        if name in longer:
            longer[name] = torch.nn.functional.pad(longer[name], (0, 2), value=value)
    with tier_routing(model, [1, 2, 3]), torch.no_grad():
        whole = model(**longer, use_cache=False).logits[:, -3:]
    assert relative_error(torch.stack(out.logits, dim=1), whole) < 1e-3


def check_ranks(seen, tier) -> None:
    """Assert that each token was with the experts of its row's tier, by the router's own ranks."""
    assert any(routed.index for routed in seen)
    for routed in seen:
        for inputs, index_TK in zip(routed.inputs, routed.index, strict=True):
            if type(routed.layer.router).__name__ == "DeepseekV4HashRouter":  # chooses by token, on all tiers alike
                assert torch.equal(index_TK, routed.layer.router.forward(*inputs[0], **inputs[1])[2])
                continue
            ranked_TE = own_ranks(routed.layer, inputs, C)
            tiers = tier if isinstance(tier, list) else [tier]
            tiers_T = [t for t in tiers for _ in range(len(index_TK) // len(tiers))]
            for chosen, ranked, of_token in zip(index_TK.tolist(), ranked_TE.tolist(), tiers_T, strict=True):
                ranks = reference.tier_ranks(of_token, C, len(ranked), routed.layer.top_k, "uniform")
                assert sorted(chosen) == sorted(ranked[rank - 1] for rank in ranks)


# ----------------------------------------------------------------------------------------------------------------- LoRA
@works("lora")
def test_a_new_adapter_changes_nothing(subject):
    assert relative_error(subject.logits(subject.adapted(random=False)), subject.plain) < 1e-5


@works("lora")
def test_logits_and_gradients_are_those_of_peft(subject):
    model = subject.adapted()
    logits, config = subject.logits(model), model.peft_config["default"]
    assert relative_error(logits, subject.plain) > 1e-3
    fields = ("r", "lora_alpha", "target_modules", "target_parameters")
    plain = get_peft_model(subject.copy(), LoraConfig(**{name: getattr(config, name) for name in fields})).eval()
    ours = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    theirs = {name: weight for name, weight in plain.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, weight in theirs.items():
            weight.copy_(ours[name])
    assert relative_error(logits, subject.logits(plain)) < 1e-4
    wanted = subject.gradients(plain, None)
    for name, gradient in subject.gradients(model, None).items():
        assert relative_error(gradient, wanted[name]) < 1e-3, name


@works("lora", "tiers")
def test_every_factor_that_tokens_reach_has_a_gradient(subject):
    model = subject.adapted()
    with observed(model) as seen:
        gradients = subject.gradients(model, [1, 2, 3])
    assert any("lora_A" in name for name in gradients)
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            continue
        target = name.replace(".base_layer", "").partition(".lora_")[0]
        routed = next(routed for routed in seen if target.startswith(f"{routed.layer.block_name}."))
        layer = routed.layer
        if "canvas_length" in model.config.to_dict() and "encoder.language_model.layers.2" in target:
            continue  # the decoder sees the keys and values that its layers begin with
        if not routed.index:  # a layer that no token came to
            assert name not in gradients or not gradients[name].any()
            continue
        reached = torch.zeros(layer.num_scores, dtype=torch.bool)
        reached[torch.cat(routed.index).flatten()] = True
        if layer.kind == "modules" and target.startswith(f"{layer.experts_name}."):
            children = list(dict(layer.experts.named_children()))
            child = target.removeprefix(f"{layer.experts_name}.").partition(".")[0]
            assert (name in gradients and bool(gradients[name].any())) == reached[children.index(child)], name
            continue
        gradient = gradients[name]
        assert gradient.isfinite().all()
        if target != layer.experts_name:
            assert gradient.any(), name
            continue
        # PEFT's layout: row e·r + k of A, column k·E + e of B.
        num = model.get_submodule(name.partition(".lora_")[0]).num_experts
        of_expert = gradient.view(num, -1) if "lora_A" in name else gradient.view(len(weight), -1, num).permute(2, 0, 1)
        reached[min(map(len, layer.stacks.values())) :] = False  # experts without weights, as longcat has
        assert torch.equal(of_expert.flatten(1).any(1), reached[:num]), name


@works("lora", "tiers")
def test_routers_are_measured_or_named(subject):
    """Tokens by expert, and what the adapter changed: 0 without its update of the router, more with it."""
    model = subject.adapted(random=False)
    if subject.row.name in ("Gemma4ForConditionalGeneration", "InklingForConditionalGeneration"):
        with pytest.raises(OrdMoERuntimeError, match="got dict"), RouterMeter(model):
            subject.logits(model)  # which makes masks of all kinds of attention before its text model
        return
    for changed in (False, True):
        with RouterMeter(model, num_tiers=C) as meter:
            subject.logits(model)
        layers = meter.report()
        ran = len(layers) + len(meter.unsupported) + len(meter.unread)
        assert ran == len(MoEModel.of(model).layers) or subject.row.folder == "ernie4_5_vl_moe"  # without images
        for layer in layers:
            assert sum(layer.utilisation) == pytest.approx(layer.num_experts)
            if "router" in subject.row.targets:
                assert (layer.drift_kl > 1e-9) == changed
        randomize_adapter(model)


@works("lora", "tiers")
def test_gradients_are_the_same_with_checkpointing(subject):
    if not subject.model.supports_gradient_checkpointing:
        pytest.skip("it has no gradient checkpointing")
    model = subject.adapted()
    wanted = subject.gradients(model, [1, 2, 3])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = subject.gradients(model, [1, 2, 3])
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative_error(got[name], gradient) < 1e-3, name


@works("lora", "merging")
def test_merged_logits_are_the_adapters(subject):
    model = subject.adapted()
    wanted = subject.logits(model)
    assert relative_error(subject.logits(model.merge_and_unload()), wanted) < 1e-3


@pytest.mark.parametrize(
    "subject", [pytest.param(r, id=r.id) for r in installed_rows() if "merging" in r.refused], indirect=True
)
def test_merging_is_refused_by_name(subject, record_property):
    model = subject.adapted()
    wanted = subject.logits(model)
    with pytest.raises(OrdMoEError, match=subject.row.refused["merging"]) as refusal:
        model.merge_and_unload()
    record_property("refused: merging", str(refusal.value))
    assert torch.equal(subject.logits(model), wanted)


@pytest.fixture(scope="session")
def plain_peft():
    with reader() as process:
        yield process


@works("lora")
def test_a_saved_adapter_is_read_back_and_by_peft(subject, plain_peft, record_property, tmp_path):
    """Of all roles that there are; by PEFT its export, in a process without the package."""
    refused, roles = subject.row.no_export, roles_of(subject.model)
    assert set(subject.row.targets) <= set(roles)
    model = subject.adapted(targets=[role for role in roles if role not in refused])
    wanted = subject.logits(model)
    torch.save(wanted, tmp_path / "wanted.pt")
    export(model, tmp_path)
    loaded = PeftModel.from_pretrained(subject.copy(), tmp_path / "adapter").eval()
    assert relative_error(subject.logits(loaded), wanted) < 1e-5
    assert plain_peft.submit(error_of_export, subject.row.id, tmp_path).result() < 1e-4
    record_property("plain PEFT", ", ".join(role for role in roles if role not in refused))
    for role in refused:
        model = subject.adapted(targets=[role])
        with pytest.raises(OrdMoEModelError, match=refused[role]) as refusal:
            export(model, tmp_path / role)
        record_property(f"refused: plain PEFT of {role}", str(refusal.value))
        assert not (tmp_path / role / "plain").exists()
        loaded = PeftModel.from_pretrained(subject.copy(), tmp_path / role / "adapter").eval()
        assert relative_error(subject.logits(loaded), subject.logits(model)) < 1e-5


def export(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder / "adapter")
    export_plain_lora(folder / "adapter", folder / "plain")


def roles_of(model) -> list[str]:
    roles = []
    for role in ALL_ROLES:
        try:
            check_fits_model(OrdMoEConfig(targets=[role]), model)
        except OrdMoEError:
            continue
        roles.append(role)
    return roles


# --------------------------------------------------------------------------------------------------------------- 4 bits
@works("4 bits")
def test_experts_in_4_bits(subject):
    model = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig())
    packed = subject.logits(model)
    assert packed.isfinite().all() and not torch.equal(packed, subject.plain)
    dense = model.dequantize()
    assert relative_error(subject.logits(dense), packed) < 1e-3
    before = dict(subject.model.named_parameters())
    for name, weight in dense.named_parameters():
        assert (weight - before[name]).norm() <= 0.2 * before[name].norm(), name


@works("4 bits")
def test_a_model_in_4_bits_is_read_back(subject, tmp_path):
    model = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig())
    model.save_pretrained(tmp_path)
    loaded = subject.mended(type(model).from_pretrained(tmp_path).eval())
    assert relative_error(subject.logits(loaded), subject.logits(model)) < 1e-3


@works("4 bits", "lora", "tiers")
def test_an_adapter_trains_in_4_bits(subject):
    base = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig())
    packed = subject.logits(base)
    model = subject.adapted(base, random=False)
    assert relative_error(subject.logits(model), packed) < 1e-5
    randomize_adapter(model)
    gradients = subject.gradients(model, [1, 2, 3])
    assert any(gradient.any() for gradient in gradients.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
