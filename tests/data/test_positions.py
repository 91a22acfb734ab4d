"""How many positions a model has, and rows that are longer."""

import pytest
import torch
from transformers import GptOssConfig, PretrainedConfig, Qwen3MoeConfig, Qwen3VLMoeConfig

from ordmoe_peft.data.positions import check_fits, num_positions
from ordmoe_peft.errors import OrdMoEDataError
from tests import models


def yarn(factor, original):
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (Qwen3MoeConfig(max_position_embeddings=300), 300),
        (Qwen3MoeConfig(max_position_embeddings=300, rope_parameters=yarn(4.0, 300)), 1200),
        (Qwen3MoeConfig(max_position_embeddings=1200, rope_parameters=yarn(4.0, 300)), 1200),
        (GptOssConfig(), 131072),
        (Qwen3VLMoeConfig(text_config={"max_position_embeddings": 70}), 70),
    ],
    ids=str,
)
def test_positions(config, positions):
    assert num_positions(config) == positions


def test_some_models_have_no_bound():
    assert num_positions(PretrainedConfig()) is None


def test_padding_takes_no_positions():
    model = models.qwen3_moe(max_position_embeddings=6)
    batch = models.text_batch(rows=1, length=8, padding=2)
    check_fits(model, batch)
    check_fits(model, {"input_ids": torch.ones(1, 6, dtype=torch.long)})
    for mask in ({"attention_mask": torch.ones(1, 8)}, {}):
        with pytest.raises(OrdMoEDataError, match="A sample has 8 tokens, and the model has 6 positions"):
            check_fits(model, {"input_ids": batch["input_ids"], **mask})
