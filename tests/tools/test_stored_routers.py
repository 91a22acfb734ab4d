"""The base's routers with an update added, read from a checkpoint's files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.families import build_model
from ordmoe_peft.tools.lora_factors import Factors
from ordmoe_peft.tools.merge_on_disk.checkpoint import open_checkpoint
from ordmoe_peft.tools.stored_routers import StoredRouters
from tests import models


E, H = models.NUM_EXPERTS, models.HIDDEN_SIZE


@pytest.fixture
def mixtral(tmp_path):
    """A base in bf16 whose checkpoint has other names than the model."""
    model = models.mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    return model, build_model(model.config), open_checkpoint(tmp_path)


def folded(skeleton, checkpoint, routers):
    return StoredRouters(skeleton, checkpoint).folded(routers)


def update(scale=1.0):
    return Factors(torch.randn(1, 2, H), torch.randn(1, E, 2) * scale)


def test_names_and_dtype_are_the_checkpoints(mixtral):
    model, skeleton, checkpoint = mixtral
    name, factors = "model.layers.1.mlp.gate.weight", update()
    patched = folded(skeleton, checkpoint, {name: factors})
    expected = (model.get_parameter(name).float() + factors.delta()[0]).to(torch.bfloat16)
    (stored,) = patched
    assert stored == "model.layers.1.block_sparse_moe.gate.weight" and stored in checkpoint.files
    assert torch.equal(patched[stored], expected)


def test_what_cannot_be_folded(mixtral):
    _, skeleton, checkpoint = mixtral
    with pytest.raises(OrdMoEModelError, match="has no tensor for the router nowhere.gate.weight"):
        folded(skeleton, checkpoint, {"nowhere.gate.weight": update()})
    with pytest.raises(OrdMoEModelError, match="NaN or infinity into model.layers.0.mlp.gate.weight"):
        folded(skeleton, checkpoint, {"model.layers.0.mlp.gate.weight": update(float("inf"))})
    file, name = checkpoint.folder / "model.safetensors", "model.layers.0.block_sparse_moe.gate.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(OrdMoEModelError, match="is of dtype torch.float8_e4m3fn in .*Give a dense base"):
        folded(skeleton, open_checkpoint(checkpoint.folder), {"model.layers.0.mlp.gate.weight": update()})
