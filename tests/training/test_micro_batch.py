"""Micro-batches know where they stand, whatever process draws them."""

from types import SimpleNamespace

import pytest

from ordmoe_peft.training.micro_batch import MICRO_BATCH, TIER_PASS, NumberedBatches, model_inputs, numbered
from tests import text
from tests.training.test_trainer import adapted, trainer_for


def test_processes_take_turns():
    indices = []
    for process in (0, 1):
        accelerator = SimpleNamespace(num_processes=2, process_index=process)
        indices.append([batch[MICRO_BATCH].index for batch in numbered([{}, {}], accelerator)])
    assert indices == [[0, 2], [1, 3]]


def test_a_loader_stays_what_it_is():
    class Loader(list):
        dataset = "rows"

    loader = NumberedBatches(
        Loader([{"input_ids": 1}, {"input_ids": 2}]), SimpleNamespace(num_processes=1, process_index=0)
    )
    assert len(loader) == 2 and loader.dataset == "rows"
    for _ in range(2):
        assert [batch[MICRO_BATCH].index for batch in loader] == [0, 1]


def test_the_model_does_not_see_what_travels_along():
    assert model_inputs({"input_ids": 1, MICRO_BATCH: 2, TIER_PASS: 3}) == {"input_ids": 1}


@pytest.mark.parametrize("settings", [{}, {"responses": "generated", "max_completion_length": 3}])
def test_an_evaluation_draws_the_same_each_time(tmp_path, settings):
    trainer = trainer_for(tmp_path, adapted(grouping="random"), per_device_eval_batch_size=2, **settings)
    first, second = (trainer.evaluate(text.conversations()) for _ in range(2))
    assert {name: value for name, value in first.items() if "tier_" in name} == {
        name: value for name, value in second.items() if "tier_" in name
    }
