"""Arguments that cannot work are refused, and those without an effect are named."""

import pytest
from peft import get_peft_model
from transformers import HfArgumentParser, training_args

from ordmoe_peft import OrdMoEConfig, OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training import arguments as arguments_module
from tests import models
from tests.training.test_trainer import adapted, arguments, trainer_for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_aux_loss_coef": 0.01}, "second balance loss"),
        ({"ntp_coef": 0, "erl_coef": 0, "balance_coef": 0}, "are all 0, which leaves nothing to learn from"),
        ({"generation_kwargs": "3"}, "generation_kwargs must be a JSON object .* got '3'"),
        ({"generation_kwargs": "{bad"}, "generation_kwargs must be a JSON object .* got '{bad'"),
        ({"erl_coef": -1.0}, "erl_coef must not be negative, got -1.0"),
        ({"objective": "ppo"}, "objective must be one of .*'erl'.*got 'ppo'"),
        ({"responses": "sampled"}, "responses must be one of .*got 'sampled'"),
        ({"scored_by": "policy"}, "same response by the same tier C times"),
        ({"objective_beta": 0.5}, "objective='erl' must have one"),
        ({"objective": "dpo", "objective_beta": -1.0}, "objective_beta=-1.0 must be positive"),
        ({"objective": "dpo", "lower_tier_floor": "uniform"}, "bounds objective='erl' alone"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"lower_tier_floor": "low"}, "'uniform', got 'low'"),
        ({"lower_tier_floor": "1.5"}, "at most 0, got 1.5"),
        ({"lower_tier_floor": "nan"}, "at most 0, got nan"),
        ({"generation_batch_size": 0}, "generation_batch_size must be at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"generation_kwargs": '{"num_return_sequences": 2}'}, "each tier writes one response"),
    ],
)
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(("given", "floor"), [("uniform", "uniform"), ("-3", -3.0), (-3, -3.0)])
def test_a_floor_is_a_number_or_a_word(tmp_path, given, floor):
    assert arguments(tmp_path, lower_tier_floor=given).lower_tier_floor == floor
    parser = HfArgumentParser(OrdMoETrainingArguments)
    options = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "--lower_tier_floor", str(given)]
    assert parser.parse_args_into_dataclasses(options)[0].lower_tier_floor == floor


class TestPrecision:
    """What is not said is chosen by what the machine has; what is said is left to transformers."""

    @pytest.fixture(autouse=True)
    def notes(self, monkeypatch):
        messages = []
        monkeypatch.setattr(arguments_module.logger, "warning_once", messages.append)
        return messages

    def has_bf16(self, monkeypatch, has_it):
        for module in (arguments_module, training_args):
            monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: has_it)

    def test_no_accelerator(self, tmp_path, monkeypatch, notes):
        self.has_bf16(monkeypatch, False)
        for changes in ({}, {"use_cpu": True}):
            assert OrdMoETrainingArguments(str(tmp_path), **changes).bf16 is False
        assert len(notes) == 2 and "not in mixed precision. Set bf16=True and use_cpu=True" in notes[1]
        assert OrdMoETrainingArguments(str(tmp_path), bf16=True, use_cpu=True).bf16
        assert OrdMoETrainingArguments(str(tmp_path), fp16=True).bf16 is False
        with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
            OrdMoETrainingArguments(str(tmp_path), bf16=True)
        assert len(notes) == 2

    def test_an_accelerator(self, tmp_path, monkeypatch, notes):
        self.has_bf16(monkeypatch, True)
        assert OrdMoETrainingArguments(str(tmp_path)).bf16
        assert OrdMoETrainingArguments(str(tmp_path), bf16=False).bf16 is False
        assert OrdMoETrainingArguments(str(tmp_path), fp16=True).bf16 is False
        assert notes == []
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # `accelerate launch --cpu`
        assert OrdMoETrainingArguments(str(tmp_path)).bf16 is False


class TestWarnings:
    """Options that change nothing say so."""

    @pytest.fixture
    def warnings(self, monkeypatch):
        messages = []
        monkeypatch.setattr(arguments_module.logger, "warning", messages.append)
        return messages

    def test_options_of_another_mode(self, tmp_path, warnings):
        arguments(tmp_path, temperature=0.5, simpo_gamma=1.0)
        assert "simpo_gamma=1.0: no effect with objective='erl', only with 'simpo'." in warnings
        assert "temperature=0.5: no effect with responses='reference', only with 'generated'." in warnings
        warnings.clear()
        arguments(tmp_path, temperature=0.5, responses="generated", simpo_gamma=1.0, objective="simpo")
        assert warnings == []

    def test_no_learning_rate(self, tmp_path, warnings):
        arguments(tmp_path, learning_rate=0.0)
        assert warnings == ["learning_rate=0: training does not move the weights."]

    def test_no_learning_rate_of_routers(self, tmp_path, warnings):
        arguments(tmp_path, router_learning_rate=0.0)
        assert warnings == ["router_learning_rate=0: training does not move the routers."]

    def test_further_settings_of_one_tier(self, tmp_path, warnings):
        trainer_for(tmp_path, adapted(num_tiers=1, grouping="random"), erl_coef=0.5, log_tiers_every=10)
        assert warnings == [
            "erl_coef=0.5, grouping='random': no effect with num_tiers=1, which is supervised fine-tuning."
        ]

    @pytest.mark.parametrize(
        ("adapter", "training", "message"),
        [
            ({}, {"share_prompt": False}, "share_prompt=False: no effect with token_scope='sequence', only with"),
            ({"tier_weights": "match"}, {}, "tier_weights='match': no effect with routers whose weights sum"),
            ({"tier_seed": 3}, {}, "tier_seed=3: no effect with grouping='uniform', only with 'random'."),
            (
                {"rewards": [1, 0, 0]},
                {"erl_coef": 0, "lower_tier_floor": "uniform", "responses": "generated", "max_completion_length": 9},
                "lower_tier_floor='uniform', responses='generated', rewards=[1, 0, 0]: no effect with erl_coef=0.",
            ),
            (
                {},
                {"erl_coef": 0, "objective": "logistic", "objective_beta": 2.0},
                "objective='logistic', objective_beta=2",
            ),
            (
                {},
                {"responses": "generated", "log_tiers_every": 5, "max_completion_length": 9},
                "log_tiers_every=5: no effect with responses=",
            ),
            (
                {},
                {"responses": "generated", "temperature": 0, "top_k": 5, "max_completion_length": 9},
                "top_k=5: no effect with temperature=0",
            ),
        ],
    )
    def test_settings_that_others_leave_without_effect(self, tmp_path, warnings, adapter, training, message):
        trainer_for(tmp_path, adapted(**adapter), **training)
        assert len(warnings) == 1 and warnings[0].startswith(message)

    def test_settings_with_an_effect(self, tmp_path, warnings):
        """Random groups scaled to match: what a router that does not renormalise gives a random group is less."""
        settings = {"token_scope": "response", "grouping": "random", "tier_seed": 3, "tier_weights": "match"}
        model = get_peft_model(models.olmoe(), OrdMoEConfig(r=4, **settings))
        trainer_for(tmp_path, model, share_prompt=False, erl_coef=0.5, log_tiers_every=5)
        assert warnings == []
