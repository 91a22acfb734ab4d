import pytest
import torch

from tests import models


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=models.FAMILIES)
def family(request) -> str:
    """Each of the families that the method supports."""
    return request.param


@pytest.fixture
def model(family):
    return models.FAMILIES[family]()


@pytest.fixture
def batch(family):
    return models.batch_for(family)
