import pytest

from ordmoe_peft import OrdMoETrainingArguments
from ordmoe_peft.cli.arguments import AdapterArguments
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.ablate.settings import Settings, fields_about_tiers


@pytest.fixture
def settings(tmp_path):
    return Settings(
        AdapterArguments(rewards=[1, 0.5, 0]),
        OrdMoETrainingArguments(str(tmp_path), bf16=False, use_cpu=True, max_steps=5),
        {"data": "some"},
    )


def test_unknown_names_are_refused(settings):
    settings.check_names(["grouping", "erl_coef", "learning_rate", "lora_r"], "grid")
    with pytest.raises(OrdMoEConfigError, match="grid names grupping, which an ablation cannot vary"):
        settings.check_names(["grupping", "erl_coef"], "grid")
    with pytest.raises(OrdMoEConfigError, match="seeds are given as `seeds`"):
        settings.check_names(["seed"], "tune")


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("learning_rate", "1e-3", 0.001),
        ("erl_coef", 0, 0.0),
        ("layer_scope", "deep", ["deep"]),
        ("layer_scope", [0, 2], ["0", "2"]),
        ("rewards", [1, "5e-1", 0], [1.0, 0.5, 0.0]),
        ("rewards", None, None),
        ("use_rslora", True, True),
        ("advantages", "none", "none"),
    ],
)
def test_values_become_what_the_command_line_makes_of_them(settings, name, value, typed):
    result = settings.typed(name, value)
    assert result == typed
    assert type(result) is type(typed)


def test_values_of_the_wrong_type_are_refused(settings):
    with pytest.raises(OrdMoEConfigError, match="num_tiers='many' cannot work: invalid int value"):
        settings.typed("num_tiers", "many")
    with pytest.raises(OrdMoEConfigError, match="grouping=.* has 2 values where the option takes one"):
        settings.typed("grouping", ["uniform", "random"])


def test_with_one_tier_what_is_about_tiers_has_no_effect(settings):
    """Three rewards do not fit one tier, but the common settings may hold them."""
    assert {"grouping", "rewards", "advantages", "erl_coef", "layer_scope"} <= fields_about_tiers()
    assert not {"num_tiers", "targets", "balance_coef", "learning_rate", "lora_r"} & fields_about_tiers()
    names = ["erl_coef", "max_steps"]
    assert settings.have_effect({"num_tiers": 1}, names) == ["max_steps"]
    assert settings.have_effect({"grouping": "random"}, names) == names
    config, args = settings.build({"num_tiers": 1, "erl_coef": 0.5, "advantages": "none"})
    assert (config.rewards, config.advantages, args.erl_coef) == (None, "zscore", 0.01)
    assert settings.key({"num_tiers": 1, "erl_coef": 0.5}) == settings.key({"num_tiers": 1, "grouping": "random"})
    for changes in ({"max_steps": 3}, {"router_learning_rate": 1e-3}, {"expert_rank": 2}):
        assert settings.key({"num_tiers": 1, **changes}) != settings.key({"num_tiers": 1})


def test_the_supervised_baseline_has_the_same_lora_on_experts():
    adapter = AdapterArguments(expert_rank="r/K", expert_selection={0: [1]})
    config, _ = Settings(adapter, OrdMoETrainingArguments("out", report_to="none"), {}).build({"num_tiers": 1})
    assert (config.expert_rank, config.expert_selection) == ("r/K", {"0": [1]})


def test_an_option_of_one_objective_is_not_tuned_for_another(settings):
    names = ["objective_beta", "erl_coef"]
    assert settings.have_effect({}, names) == ["erl_coef"]
    assert settings.have_effect({"objective": "logistic"}, names) == names


def test_zscore_is_blind_to_the_scale_of_rewards_and_center_is_not(settings):
    keys = {
        (advantages, scale): settings.key(
            {"num_tiers": 3, "advantages": advantages, "rewards": [scale, scale / 2, 0.0]}
        )
        for advantages in ("zscore", "center")
        for scale in (1.0, 2.0)
    }
    assert keys["zscore", 1.0] == keys["zscore", 2.0]
    assert keys["center", 1.0] != keys["center", 2.0]


def test_where_results_go_does_not_tell_runs_apart(settings, tmp_path):
    elsewhere = Settings(
        settings.adapter,
        OrdMoETrainingArguments(
            str(tmp_path / "other"), bf16=False, use_cpu=True, max_steps=5, report_to="tensorboard", seed=9
        ),
        settings.fixed,
    )
    assert elsewhere.key({}) == settings.key({})
    assert Settings(settings.adapter, settings.training, {"data": "other"}).key({}) != settings.key({})


def test_what_cannot_work_is_refused_before_it_runs(settings):
    with pytest.raises(OrdMoEConfigError, match="rewards needs one value for each of the 2 tiers"):
        settings.build({"num_tiers": 2})
    with pytest.raises(OrdMoEConfigError, match="grouping must be one of"):
        settings.build({"grouping": "sorted"})
