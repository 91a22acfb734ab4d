"""Settings that cannot work together, and settings without effect."""

import pytest

from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.training import settings_checks
from ordmoe_peft.training.settings_checks import check_causal
from tests.families.rows import ROWS
from tests.families.subject import Subject
from tests.training.test_trainer import adapted, trainer_for


class TestRefusals:
    def test_rewards_for_an_objective_that_takes_the_order_alone(self, tmp_path):
        with pytest.raises(OrdMoEConfigError, match="no effect on objective='logistic'"):
            trainer_for(tmp_path, adapted(rewards=[1, 0.9, 0]), objective="logistic")

    def test_advantages_for_such_an_objective(self, tmp_path):
        with pytest.raises(OrdMoEConfigError, match="advantages='center' have no effect on objective='dpo'"):
            trainer_for(tmp_path, adapted(advantages="center"), objective="dpo")

    def test_rewards_that_are_all_the_same(self, tmp_path):
        with pytest.raises(OrdMoEConfigError, match=r"rewards=\[1, 1, 1\] .*L_ERL has no gradient"):
            trainer_for(tmp_path, adapted(rewards=[1, 1, 1]))

    @pytest.mark.parametrize("num_tiers", [1, 3])
    def test_label_smoothing_with_further_losses(self, tmp_path, num_tiers):
        """TRL would run the forward that balance comes from without gradient."""
        with pytest.raises(OrdMoEConfigError, match="label_smoothing_factor=0.1"):
            trainer_for(tmp_path, adapted(num_tiers=num_tiers), label_smoothing_factor=0.1)

    def test_one_tier_without_a_supervised_loss(self, tmp_path):
        with pytest.raises(OrdMoEConfigError, match="ntp_coef=0 with num_tiers=1 leaves nothing to learn"):
            trainer_for(tmp_path, adapted(num_tiers=1), ntp_coef=0.0)

    def test_padding_free_batches(self, tmp_path):
        with pytest.raises(OrdMoEConfigError, match="num_tiers=3 would repeat"):
            trainer_for(tmp_path, padding_free=True, max_length=None)


class TestWarnings:
    @pytest.fixture
    def warnings(self, monkeypatch):
        messages = []
        monkeypatch.setattr(settings_checks.logger, "warning", messages.append)
        return messages

    def test_one_tier(self, tmp_path, warnings):
        trainer_for(tmp_path, adapted(num_tiers=1), responses="generated", objective="dpo")
        assert any("responses='generated', objective='dpo' and" in message for message in warnings)

    def test_a_floor_that_no_tier_can_reach(self, tmp_path, warnings):
        trainer_for(tmp_path, adapted(advantages="none"), lower_tier_floor="uniform")
        assert any("lower_tier_floor='uniform' has no effect" in message for message in warnings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SwitchTransformersForConditionalGeneration", "is no causal language model"),
        ("DiffusionGemmaForBlockDiffusion", "is no causal language model"),
        ("Llama4ForCausalLM", "names 'language_model' as its part below the head"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_by_name(name, message):
    model = Subject(next(row for row in ROWS if row.name == name)).adapted()
    with pytest.raises(OrdMoEModelError, match=message):
        check_causal(model)
