"""Beside text: images and sounds are on tiers as text is, encoders run once, towers and talkers are left alone."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.data import images
from ordmoe_peft.data.images import ENCODED, PIXELS, encode_images
from ordmoe_peft.errors import OrdMoEModelError, OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.monitoring.router_meter import RouterMeter
from ordmoe_peft.training.row_layout.separate import separate_rows
from tests import models, reference
from tests.families import tiny
from tests.families.observed import observed, own_ranks
from tests.families.rows import TALKER, THINKER, installed_rows, under
from tests.families.subject import relative_error
from tests.families.test_families import C, check_ranks
from tests.families.tiny import AUDIO_TOKEN, IMAGE_TOKEN


TIERS = [1, 2, 3]
# Models that take no encoded images.
TAKES_PIXELS = {"DiffusionGemmaForBlockDiffusion", "Llama4ForConditionalGeneration"}
WITH_MEDIA = [row for row in installed_rows() if "tokens" in row.media and "tiers" not in row.refused]


def of(name: str):
    """The test's one row, by its model class."""
    row = next(row for row in installed_rows() if row.name == name)
    return pytest.mark.parametrize("subject", [row], ids=[row.id], indirect=True, scope="module")


with_media = pytest.mark.parametrize(
    "subject", WITH_MEDIA, ids=[row.id for row in WITH_MEDIA], indirect=True, scope="module"
)


def encoders(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost models in `model` that are neither text models nor hold one."""
    texts = [name for name, part in model.named_modules() if part in MoEModel.of(model).text_models]
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        is_around = any(text.startswith(f"{name}.") or text == name for text in texts)
        is_inside = any(name.startswith(f"{text}.") for text in (*texts, *found))
        if name and isinstance(part, PreTrainedModel) and not is_around and not is_inside:
            found[name] = part
    return found


@contextmanager
def counted(parts: dict[str, nn.Module]) -> Iterator[Counter]:
    """How often each part runs within the block."""
    runs: Counter = Counter()
    handles = [part.register_forward_hook(lambda *_, name=name: runs.update([name])) for name, part in parts.items()]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------- images and sounds
@with_media
def test_images_and_sounds_are_on_the_tiers_of_their_rows(subject):
    """Each token of an image is with the experts of its row's tier, and tiers change what it is with."""
    is_media_BS = torch.isin(subject.batch["input_ids"], torch.tensor([IMAGE_TOKEN, AUDIO_TOKEN]))
    assert is_media_BS.any(1).all() and not is_media_BS.all(1).any()
    model, layers = subject.copy(), 0
    with tier_routing(model, TIERS), observed(model) as seen:
        subject.logits(model)
    for routed in seen:
        of_images = routed.layer.block_name.endswith("vision_moe")  # ERNIE's, which get no other tokens
        is_media_T = is_media_BS[is_media_BS] if of_images else is_media_BS.flatten()
        for inputs, index_TK in zip(routed.inputs, routed.index, strict=True):
            if len(index_TK) != len(is_media_T):  # ERNIE's for text, and DiffusionGemma's decoder, which writes text
                assert len(index_TK) in ((~is_media_BS).sum(), subject.batch.get("decoder_input_ids", index_TK).numel())
                continue
            layers += 1
            ranked_TE, of_row = own_ranks(routed.layer, inputs, C), len(index_TK) // len(TIERS)
            for token in is_media_T.nonzero().flatten().tolist():
                tier, (num_ranked, top_k) = TIERS[token // of_row], (ranked_TE.shape[1], index_TK.shape[1])
                ranks = reference.tier_ranks(tier, C, num_ranked, top_k, "uniform")
                assert set(index_TK[token].tolist()) == {int(ranked_TE[token, rank - 1]) for rank in ranks}
    assert layers


@with_media
def test_encoders_run_once_whatever_the_tiers(subject):
    model = subject.copy()
    with counted(encoders(model)) as plainly:
        subject.logits(model)
    with counted(encoders(model)) as on_tiers, tier_routing(model, TIERS):
        subject.logits(model)
    assert set(plainly.values()) == {1}
    assert on_tiers == plainly


@with_media
def test_encoders_run_once_for_the_tiers_of_a_step(subject, monkeypatch):
    """Pixels are encoded before the passes. What transformers' models take as it is alone is encoded in each, which is
    said."""
    model = subject.adapted()
    labelled = subject.batch | {"labels": subject.batch["input_ids"]}
    is_encoded = any(name in subject.batch for name in PIXELS) and subject.row.name not in TAKES_PIXELS

    def on_tiers(batch: dict, tiers: list[int]) -> torch.Tensor:
        rows = separate_rows([batch] * len(tiers), tiers, "sequence", pad_token_id=0)
        inputs = {name: value for name, value in rows.inputs.items() if name != "labels"}
        with torch.no_grad(), tier_routing(model, rows.tiers):
            return model(**inputs).logits

    said = []
    monkeypatch.setattr(images.logger, "warning_once", said.append)
    with counted(encoders(model)) as runs:
        with torch.no_grad():
            encoded = encode_images(model, labelled)
        assert (ENCODED in encoded) == is_encoded
        assert ["encoder runs once for each tier" in message for message in said] == [True] * (not is_encoded)
        got = on_tiers(encoded, [1, 3])
    # Llama 4's forward reads another part of what its encoder returns, which is seen only once it has run.
    assert set(runs.values()) == {2 if subject.row.folder == "llama4" else 1}
    assert relative_error(got, on_tiers(labelled, [1, 3])) < 1e-4
    assert relative_error(got[:3], got[3:]) > 1e-3


# --------------------------------------------------------------------------------------------------- towers and talkers
def adapted_parts(model: nn.Module) -> set[str]:
    """Names of the modules that have factors, without PEFT's prefix and wrappers."""
    return {
        name.partition(".lora_")[0].removeprefix("base_model.model.").replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


@of("Dots3NoteForConditionalGeneration")
def test_a_towers_experts_are_left_alone(subject):
    """Dots3-note's vision tower has a Mixture of Experts of its own."""
    model = subject.copy()
    tower = model.model.vision_tower
    names = [name for name, _ in tower.named_modules() if name.endswith("experts")]
    assert names
    outputs = []
    tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    subject.logits(model)
    with tier_routing(model, 3):
        assert relative_error(subject.logits(model), subject.plain) > 1e-3
    first, second = (output.last_hidden_state for output in outputs)
    assert torch.equal(first, second)
    adapted = subject.adapted(model)
    assert adapted_parts(adapted) and not any("vision_tower" in name for name in adapted_parts(adapted))


@of("Dots3NoteForConditionalGeneration")
def test_a_tower_that_is_passed_is_held_and_adapted(subject):
    model = subject.copy()
    tower = model.model.vision_tower
    outputs = []
    tower.register_forward_hook(lambda module, args, output: outputs.append(output.last_hidden_state))
    with observed(model) as text:
        subject.logits(model)
        with tier_routing(tower, 3), observed(tower) as seen:
            subject.logits(model)
    check_ranks(seen, 3)
    assert relative_error(outputs[1], outputs[0]) > 1e-3
    for routed in text:  # the first text layer sees other images, and is as it is
        for inputs, index_TK in zip(routed.inputs, routed.index, strict=True):
            top_TK = own_ranks(routed.layer, inputs, C)[:, : index_TK.shape[1]]
            assert torch.equal(top_TK.sort().values, index_TK.sort().values)
    model.model.vision_tower = get_peft_model(tower, OrdMoEConfig(r=4))
    models.randomize_adapter(model)
    assert {name.partition(".")[0] for name in adapted_parts(model.model)} == {"vision_tower"}
    assert relative_error(subject.logits(model), subject.plain) > 1e-3


@of("Ernie4_5_VLMoeForConditionalGeneration")
@pytest.mark.parametrize("tiers", [3, TIERS], ids=["tier_3", "mixed"])
def test_experts_of_both_kinds_of_tokens_are_held(subject, tiers):
    """ERNIE sends text to text experts and images to others, each with a router, which gets no other tokens."""
    model, is_image_T = subject.copy(), subject.batch["moe_mm_token_type_ids"].flatten().bool()
    with tier_routing(model, tiers), observed(model) as seen:
        subject.logits(model)
    kinds = Counter(routed.layer.block_name.rpartition(".")[2] for routed in seen)
    assert kinds == {"text_moe": 2, "vision_moe": 2}
    for routed in seen:
        (index_TK,) = routed.index
        of_images = routed.layer.block_name.endswith("vision_moe")
        assert len(index_TK) == (is_image_T == of_images).sum()
    check_ranks(seen, tiers)
    adapted = adapted_parts(subject.adapted(model))
    for kind in kinds:
        assert any(f"{kind}.gate" in name for name in adapted) and any(f"{kind}.experts" in name for name in adapted)


@of("Ernie4_5_VLMoeForConditionalGeneration")
@pytest.mark.parametrize("settings", [{"grouping": "random", "seed": 3}, {"tier_weights": "match"}], ids=str)
def test_rows_with_both_kinds_of_tokens_are_what_they_are_alone(subject, settings):
    model = subject.copy()
    with tier_routing(model, TIERS, **settings):
        mixed = subject.logits(model)
    for row, tier in enumerate(TIERS):
        with tier_routing(model, [tier] * 3, **settings):
            assert relative_error(mixed[row], subject.logits(model)[row]) < 1e-5


@of("Ernie4_5_VLMoeForConditionalGeneration")
def test_health_is_of_the_tokens_of_each_kind(subject):
    model = subject.copy()
    with tier_routing(model, [1, 2, 1]), RouterMeter(model) as meter:
        subject.logits(model)
    num_images = int(subject.batch["moe_mm_token_type_ids"][[0, 2]].sum())
    counted = {layer.name.rpartition(".")[2]: layer.num_tokens for layer in meter.report()}
    assert counted == {"text_moe": 2 * subject.batch["input_ids"].shape[1] - num_images, "vision_moe": num_images}


@of("Ernie4_5_VLMoeForConditionalGeneration")
def test_tokens_of_other_kinds_are_refused_where_rows_are_on_tiers_of_their_own(subject):
    """Where which tokens a router gets cannot be known, as with kinds that the text model is not given."""
    model = subject.copy()
    block = model.model.language_model.layers[1].mlp
    block.register_forward_pre_hook(lambda module, args: (args[0], args[1].roll(1, 1) * (args[1].cumsum(1) < 3)))
    refused = pytest.raises(OrdMoERuntimeError, match=r"layers\.1\.mlp\.text_moe\.gate got \d+ tokens in a forward")
    with refused, tier_routing(model, TIERS):
        subject.logits(model)


# ---------------------------------------------------------------------------------------------- thinker and talker
@pytest.fixture(scope="module")
def omni():
    """The full Qwen3-Omni, which has no forward of its own: `generate` runs the thinker, and then the talker."""
    changes = under("thinker_config", THINKER) | under("talker_config", TALKER)
    changes |= under("code2wav_config", {"decoder_dim": 32, "codebook_size": 16})
    config = tiny.tiny_config(Qwen3OmniMoeConfig, changes)
    model = tiny.tiny_model(Qwen3OmniMoeForConditionalGeneration, config).requires_grad_(False)
    by_name = {row.name: row for row in installed_rows()}
    thinker_row, talker_row = (by_name[f"Qwen3OmniMoe{part}ForConditionalGeneration"] for part in ("Thinker", "Talker"))
    return (
        model,
        tiny.tiny_batch(model.thinker, thinker_row.media),
        tiny.tiny_batch(model.talker, talker_row.media),
    )


def both_logits(omni) -> tuple[torch.Tensor, torch.Tensor]:
    model, thinker_batch, talker_batch = omni
    with torch.no_grad():
        return model.thinker(**thinker_batch).logits, model.talker(**talker_batch).logits


@pytest.mark.parametrize("part", ["", "thinker", "talker"], ids=["all", "thinker", "talker"])
def test_the_thinker_is_held_unless_the_talker_is_passed(omni, part):
    model = omni[0]
    plain = both_logits(omni)
    with tier_routing(model.get_submodule(part), 3):
        held = both_logits(omni)
    moved = [relative_error(now, before) > 1e-3 for now, before in zip(held, plain, strict=True)]
    assert moved == [part != "talker", part == "talker"]
    same = held[1] if moved[0] else held[0]
    assert torch.equal(same, plain[1] if moved[0] else plain[0])


def test_thinker_and_talker_are_on_tiers_of_their_own(omni):
    model = omni[0]
    held = tier_routing(model, 2), tier_routing(model.talker, 3)
    with held[0], held[1], observed(model.thinker) as thinker, observed(model.talker) as talker:
        both_logits(omni)
    check_ranks(thinker, 2)
    check_ranks(talker, 3)


@pytest.mark.parametrize("part", ["", "talker"], ids=["all", "talker"])
def test_the_thinker_is_adapted_unless_the_talker_is_passed(omni, part):
    model, *batches = copy.deepcopy(omni[0]), *omni[1:]
    targets = ["router", "experts", "attention"][: 2 if part else 3]
    adapted = get_peft_model(model.get_submodule(part), OrdMoEConfig(r=4, targets=targets))
    models.randomize_adapter(adapted)
    plain, got = both_logits(omni), both_logits((model, *batches))
    moved = [relative_error(now, before) > 1e-3 for now, before in zip(got, plain, strict=True)]
    assert moved == [part != "talker", part == "talker"]
    if not part:
        assert {name.partition(".")[0] for name in adapted_parts(adapted)} == {"thinker"}
        assert not any(word in name for name in adapted_parts(adapted) for word in ("visual", "audio_tower"))
    else:  # its attention would stand for its code predictor's, too
        with pytest.raises(OrdMoEModelError, match="LoRA on code_predictor.* too"):
            get_peft_model(copy.deepcopy(omni[0]).talker, OrdMoEConfig(targets=["attention"]))
