import gc

import pytest
import torch
import transformers.dynamic_module_utils

from tests import models


# Two workers on two cores: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage():
    """Collecting garbage does not look at what is imported by now: accelerate collects whenever a training begins."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def code_cache(tmp_path_factory):
    """Where transformers copies code to before it runs it: not the user's own cache.

    One for all tests of a process: Python looks for a package's modules where it found the first of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        yield folder


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
