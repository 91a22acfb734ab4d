"""Shipped facts give the published parameter counts."""

import pytest
import torch

from ordmoe_peft.tools.plan.known_models import KNOWN_MODELS, load_config
from ordmoe_peft.tools.plan.weights import build_meta_model


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_parameters_are_those_published(name):
    known = KNOWN_MODELS[name]
    model = build_meta_model(load_config(name), torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    digits = len(known["parameters"].partition(".")[2])
    assert f"{count:.{digits}f}" == known["parameters"], known["source"]


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_hub_ids_stand_for_the_name(name):
    for hub_id in KNOWN_MODELS[name]["hub_ids"]:
        assert load_config(hub_id).to_dict() == load_config(name).to_dict()
