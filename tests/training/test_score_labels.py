import pytest
import torch
from trl.trainer import utils

from ordmoe_peft.training.score_labels import score_labelled
from tests import models


FIELDS = ("log_probs", "entropy", "is_top1")


def scored_model(family):
    model = models.FAMILIES[family]()
    utils.add_fused_lm_head(model, outputs=FIELDS)
    return model, models.batch_for(family) | {"fused_lm_head": True}


def labels_of(inputs, where):
    return inputs["input_ids"].masked_fill(~where, -100)


def last_three(inputs):
    ids = inputs["input_ids"]
    return (torch.arange(ids.shape[1]) >= ids.shape[1] - 3).expand_as(ids)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_says_what_the_model_says_of_all_positions(family):
    model, inputs = scored_model(family)
    labels = labels_of(inputs, last_three(inputs))
    wanted = model(**inputs, labels=labels)
    got = score_labelled(model, model.base_model, inputs | {"labels": labels})
    for name in (*FIELDS, "label_mask"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(got.loss, wanted.loss)


def test_takes_labels_that_are_shifted_already():
    model, inputs = scored_model("qwen3_moe")
    shifted = labels_of(inputs, last_three(inputs))
    wanted = model(**inputs, shift_labels=shifted)
    got = score_labelled(model, model.base_model, inputs | {"shift_labels": shifted})
    assert got.log_probs.shape == shifted.shape
    torch.testing.assert_close(got.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-6)


def test_the_head_sees_labelled_positions_alone(monkeypatch):
    model, inputs = scored_model("qwen3_moe")
    labels = labels_of(inputs, last_three(inputs))
    seen = []
    head = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda hidden, *args: seen.append(len(hidden)) or head(hidden, *args)
    )
    score_labelled(model, model.base_model, inputs | {"labels": labels})
    assert seen == [3 * len(labels)]


def test_gradients_are_the_models_own():
    model, inputs = scored_model("qwen3_moe")
    labels = labels_of(inputs, last_three(inputs))
    gradients = []
    for outputs in (
        model(**inputs, labels=labels),
        score_labelled(model, model.base_model, inputs | {"labels": labels}),
    ):
        gradients.append(torch.autograd.grad(outputs.log_probs.sum(), [*model.base_model.parameters()]))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_without_labels_all_is_zero_and_still_has_a_gradient():
    model, inputs = scored_model("qwen3_moe")
    labels = torch.full_like(inputs["input_ids"], -100)
    outputs = score_labelled(model, model.base_model, inputs | {"labels": labels})
    assert outputs.log_probs.shape == labels[:, 1:].shape
    assert not outputs.log_probs.any()
    outputs.log_probs.sum().backward()
    assert not any(p.grad.any() for p in model.base_model.parameters() if p.grad is not None)


def test_an_error_in_the_model_leaves_no_hook():
    model, inputs = scored_model("qwen3_moe")
    inputs["input_ids"] = inputs["input_ids"] + 10**6
    with pytest.raises(IndexError):
        score_labelled(model, model.base_model, inputs | {"labels": inputs["input_ids"]})
    assert not model.base_model._forward_hooks
