import pytest
import torch

from tests import models


# Two workers on two cores: more threads would only wait for each other.
torch.set_num_threads(1)


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
