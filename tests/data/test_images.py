"""Encoded images in place of pixel values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.data import images as images_module
from ordmoe_peft.data.generation import generate_by_tier, repeat_rows
from ordmoe_peft.data.images import encode_images, row_positions
from ordmoe_peft.training.row_layout.separate import left_padded_prompts, stack_rows
from tests import models
from tests.training.row_layout.test_shared_prompt import adapted, assert_same, image_rows, results


def images_encoded(model) -> list[int]:
    """Patches of each run of the model's vision encoder from now on."""
    patches = []
    visual = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("visual")))
    visual.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))
    return patches


def prompts():
    batch = models.image_batch()
    return batch | {"labels": torch.full_like(batch["input_ids"], -100)}


def test_models_say_the_same_of_encoded_images():
    """More than one image in a row, and none: features follow the rows' placeholders."""
    model, batch = models.qwen3_vl_moe(), models.image_batch(3)
    with torch.no_grad():
        encoded = encode_images(model, batch)
    assert "pixel_values" not in encoded and "image_grid_thw" in encoded
    with torch.no_grad():
        assert torch.equal(model(**encoded).logits, model(**batch).logits)
        repeated, twice = model(**repeat_rows(encoded, 2)).logits, model(**repeat_rows(batch, 2)).logits
    torch.testing.assert_close(repeated, twice)
    assert encode_images(model, encoded) == encoded


@pytest.mark.parametrize("token_scope", ["sequence", "response"])
def test_loss_and_gradients_are_those_of_pixel_values(token_scope):
    model, batch = adapted(models.qwen3_vl_moe), image_rows()
    model.peft_config["default"].token_scope = token_scope
    settings = {"tiers": [1, 3], "logged_tiers": [2], "needs_reference": True}
    patches = images_encoded(model)
    got = results(model, encode_images(model, batch), 3, None, **settings)
    assert patches == [len(batch["pixel_values"])]
    assert_same(got, results(model, batch, 3, None, **settings))
    assert len(patches) > 2


def test_tiers_write_to_the_same_encoded_images():
    model, batch = models.qwen3_vl_moe(), models.image_batch()
    patches = images_encoded(model)
    settings = {"seed": 0, "end_ids": torch.tensor([models.EOS]), "pad_token_id": 0, "max_new_tokens": 4}
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        patches.clear()
        together = generate_by_tier(model, batch, [1, 2, 3], rows_per_call=2, **settings, **options)
        assert patches == [len(batch["pixel_values"])]
        for place, tier in enumerate([1, 2, 3]):
            alone = generate_by_tier(model, batch, [tier], **settings, **options)
            width = alone.ids_CBS.shape[2]
            assert torch.equal(together.ids_CBS[place][:, :width], alone.ids_CBS[0])


def test_rows_of_batches_keep_their_images_in_order():
    model = models.qwen3_vl_moe()
    first, second = (prompts() | {"pixel_values": torch.randn(32, 96)} for _ in range(2))
    with torch.no_grad():
        rows = stack_rows([encode_images(model, first), encode_images(model, second)], models.PAD)
        wanted = torch.cat([model(**{**batch, "labels": None}).logits for batch in (first, second)])
        torch.testing.assert_close(model(**{**rows, "labels": None}).logits, wanted)


def test_prompts_of_a_batch_keep_their_encoded_images():
    model, batch = models.qwen3_vl_moe(), image_rows()
    with torch.no_grad():
        ours = left_padded_prompts(encode_images(model, batch), models.PAD)
        wanted = model(**left_padded_prompts(batch, models.PAD)).logits
        assert torch.equal(model(**ours).logits, wanted)


def test_pixel_values_stay_where_the_encoder_is_trained_or_takes_no_outputs(monkeypatch):
    said = []
    monkeypatch.setattr(images_module.logger, "warning_once", said.append)
    batch = models.image_batch()
    trained = get_peft_model(models.qwen3_vl_moe(), LoraConfig(target_modules=["qkv"], r=2))
    assert encode_images(trained, batch) is batch
    assert "are trained" in said[-1]
    assert encode_images(models.qwen3_moe(), batch) is batch
    assert "takes no encoded images" in said[-1]
    text = models.text_batch()
    assert encode_images(models.qwen3_moe(), text) is text
    assert len(said) == 2


def test_adapters_of_ours_leave_the_encoder_alone():
    roles = ["router", "experts", "attention"]
    model = get_peft_model(models.qwen3_vl_moe(), OrdMoEConfig(r=2, targets=roles))
    assert "pixel_values" not in encode_images(model, models.image_batch())


def test_positions_are_the_models_own():
    """Seen where the model hands them to its text layers."""
    seen = []
    for model, batch in ((models.qwen3_vl_moe(), models.image_batch()), (models.qwen3_moe(), models.text_batch())):
        decoder = model.get_submodule("model.language_model" if "pixel_values" in batch else "model")
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        model(**batch)
        positions = row_positions(model, batch)
        wanted = torch.arange(batch["input_ids"].shape[1]).expand_as(positions) if seen[-1] is None else seen[-1]
        assert torch.equal(positions, wanted)
    assert row_positions(models.qwen3_vl_moe(), models.image_batch()).shape == (3, 2, 13)
