import pytest
import torch

from ordmoe_peft.tools.measure.paired import mean_and_error, paired_difference, student_t


def test_a_constant_difference_has_an_interval_of_one_point():
    baseline_SN = torch.rand(3, 20)
    difference = paired_difference(baseline_SN + 0.5, baseline_SN)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    assert difference.is_gain
    assert difference.verdict == "gain"
    assert paired_difference(baseline_SN, baseline_SN + 0.5).verdict == "loss"


def test_no_difference_is_no_gain():
    values_SN = torch.rand(3, 20)
    difference = paired_difference(values_SN, values_SN)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert not difference.is_gain
    assert difference.verdict == "no difference shown"


def test_a_difference_inside_its_interval_is_no_gain():
    """Two of three items better, one worse: the mean is above 0, and resamples of three items often are not."""
    values_SN = torch.tensor([[1.0, 1.0, 0.0]])
    baseline_SN = torch.tensor([[0.0, 0.0, 1.0]])
    difference = paired_difference(values_SN, baseline_SN)
    assert difference.mean == pytest.approx(1 / 3)
    assert difference.low < 0 < difference.high
    assert difference.verdict == "no difference shown"


def test_pairing_takes_out_what_items_and_seeds_share():
    hardness_1N = 100 * torch.rand(1, 50)
    luck_S1 = 10 * torch.rand(4, 1)
    baseline_SN = hardness_1N + luck_S1
    difference = paired_difference(baseline_SN + 1, baseline_SN)
    assert difference.high - difference.low < 1e-3


def test_one_seed_gives_the_interval_of_items_alone():
    """Differences of ±1 in equal parts: standard error √(1/N)."""
    signs_1N = torch.tensor([[1.0, -1.0]]).repeat(1, 200)
    difference = paired_difference(signs_1N, torch.zeros(1, 400))
    assert difference.high == pytest.approx(1.96 / 20, rel=0.06)
    assert difference.low == pytest.approx(-1.96 / 20, rel=0.06)


def test_seed_noise_alone_gives_students_interval():
    """Means over seeds of −2 … 2: standard deviation √2.5, standard error √0.5, t 2.776 with 4 degrees of freedom."""
    values_SN = torch.arange(-2.0, 3.0).unsqueeze(1).expand(5, 10)
    difference = paired_difference(values_SN, torch.zeros(5, 10), resamples=8000)
    assert difference.high == pytest.approx(2.776 * 0.5**0.5, rel=0.05)
    assert difference.low == pytest.approx(-2.776 * 0.5**0.5, rel=0.05)


@pytest.mark.parametrize(("seed_noise", "item_noise"), [(1.0, 0.0), (0.0, 3.0), (0.3, 3.0)])
def test_intervals_cover_the_truth_as_often_as_they_say(seed_noise, item_noise):
    """200 experiments of 5 seeds and 100 items: a 95 % interval misses about 10, by chance up to 19 (3 deviations)."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for experiment in range(200):
        seeds_S1 = seed_noise * torch.randn(5, 1, generator=generator)
        items_1N = item_noise * torch.randn(1, 100, generator=generator)
        difference = paired_difference(0.7 + seeds_S1 + items_1N, torch.zeros(5, 100), resamples=500, seed=experiment)
        missed += not difference.low <= 0.7 <= difference.high
    assert missed <= 19


def test_the_same_data_give_the_same_interval():
    values_SN, baseline_SN = torch.rand(3, 30), torch.rand(3, 30)
    assert paired_difference(values_SN, baseline_SN) == paired_difference(values_SN, baseline_SN)


def test_a_baseline_without_seeds_is_compared_with_every_seed():
    values_SN = torch.rand(3, 30)
    assert paired_difference(values_SN, torch.zeros(1, 30)).mean == pytest.approx(values_SN.mean().item())


def test_a_run_without_a_number_gives_no_verdict():
    values_SN = torch.tensor([[1.0, float("nan")]])
    assert paired_difference(values_SN, torch.zeros(1, 2)).verdict == "undefined"


def test_unpaired_runs_are_refused():
    for shape in ((3, 30), (2, 29)):
        with pytest.raises(ValueError, match="not paired"):
            paired_difference(torch.zeros(2, 30), torch.zeros(shape))


def test_mean_and_standard_error():
    """1, 2, 3: standard deviation 1, over √3."""
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == pytest.approx((2.0, 3**-0.5))
    assert mean_and_error([4.0]) == (4.0, None)


def test_students_t():
    """The 97.5 % points of any printed table."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 99: 1.984}
    for degrees, point in table.items():
        assert student_t(degrees) == pytest.approx(point, abs=1e-3)
