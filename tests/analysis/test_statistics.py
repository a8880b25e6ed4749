"""The statistics agree with closed forms and with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import trim_mean, ttest_ind

from lightning_hyper.analysis.statistics import (
    FEWEST,
    area_under_curve,
    bootstrap_interval,
    holm,
    interquartile_mean,
    welch,
)


@pytest.mark.parametrize("count", [4, 8, 12, 40])
def test_the_interquartile_mean_is_the_trimmed_mean_where_quarters_are_whole(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25))


def test_the_interquartile_mean_weighs_the_edges_by_their_part_inside() -> None:
    # Of five values the middle half reaches 0.75 of a value to each side of the middle one, and ends at 1.25 values.
    assert interquartile_mean([100, 3, 1, 2, -50]) == pytest.approx((0.75 * 1 + 2 + 0.75 * 3) / 2.5)
    assert interquartile_mean([1, 2, 9]) == pytest.approx((0.25 * 1 + 2 + 0.25 * 9) / 1.5)
    assert interquartile_mean([1, 2]) == 1.5
    assert interquartile_mean([7.0]) == 7.0


def test_the_interquartile_mean_is_that_of_every_value_repeated_four_times() -> None:
    values = np.random.default_rng(1).normal(size=7)
    assert interquartile_mean(values) == pytest.approx(trim_mean(np.repeat(values, 4), 0.25))


def test_the_interquartile_mean_runs_along_the_axis() -> None:
    values = np.random.default_rng(2).normal(size=(3, 8, 2))
    np.testing.assert_allclose(interquartile_mean(values, axis=1), trim_mean(values, 0.25, axis=1))


def test_what_is_not_a_number_is_not_hidden() -> None:
    assert np.isnan(interquartile_mean([1, 2, 3, 4, np.nan]))


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interquartile_mean([])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(np.zeros((0, 3)))


def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(size=400)
    low, high = bootstrap_interval(values, np.mean)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.15 * error)


def test_the_bootstrap_is_fixed_and_has_no_width_for_one_seed() -> None:
    values = np.random.default_rng(4).normal(size=(5, 3))
    np.testing.assert_array_equal(bootstrap_interval(values), bootstrap_interval(values))
    np.testing.assert_array_equal(bootstrap_interval(values[:1]), [values[0], values[0]])


@pytest.mark.parametrize("counts", [(3, 3), (3, 5), (4, 9), (30, 80)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_the_test_of_a_difference_is_welchs(counts: tuple[int, int], scale: float) -> None:
    generator = np.random.default_rng(5)
    values, baseline = 1 + scale * generator.normal(size=counts[0]), generator.normal(size=counts[1])
    expected = ttest_ind(values, baseline, equal_var=False)
    difference, low, high, p = welch(values, baseline, confidence=0.9)
    assert difference == pytest.approx(values.mean() - baseline.mean())
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-4)
    assert p == pytest.approx(expected.pvalue, abs=1e-6)


def test_seeds_that_do_not_differ_decide_nothing() -> None:
    for values, baseline, difference in (([1, 1, 1], [1, 1, 1, 1], 0.0), ([0.1] * 3, [0.3] * 5, -0.2)):
        found = welch(values, baseline)
        assert found[0] == pytest.approx(difference)
        assert np.isnan(found[1:]).all()
    with pytest.raises(ValueError, match="at least 3 seeds"):
        welch([1, 2, 3], [1, 2])


def test_holms_correction_is_that_of_its_paper() -> None:
    # Multiplied by the number of tests not yet decided, never falling, at most 1.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    np.testing.assert_array_equal(holm([np.nan, 0.01, np.nan]), [np.nan, 0.01, np.nan])
    assert holm([]).shape == (0,)


def test_the_bootstrap_draws_whole_seeds() -> None:
    seeds = np.random.default_rng(5).normal(size=6)
    low, high = bootstrap_interval(np.stack([seeds, seeds + 10], axis=1))
    assert low[1] - low[0] == pytest.approx(10)
    assert high[1] - high[0] == pytest.approx(10)


@pytest.mark.parametrize("seeds", range(1, 8))
def test_the_interval_of_few_seeds_is_their_least_and_largest(seeds: int) -> None:
    values = np.random.default_rng(6).normal(size=(seeds, 3))
    all_of_them = np.array_equal(bootstrap_interval(values), [values.min(0), values.max(0)])
    assert all_of_them == (seeds < FEWEST)


def test_intervals_hold_the_truth_as_often_as_reports_say() -> None:
    # Of methods whose values are normal with mean 0.
    generator, trials = np.random.default_rng(7), 1500
    five = [bootstrap_interval(values, resamples=400) for values in generator.normal(size=(trials, 5))]
    three = [(values.min(), values.max()) for values in generator.normal(size=(trials, 3))]
    for intervals, share in ((five, 0.9), (three, 0.75)):
        assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("solves", [None, 0.5, 0.8])
def test_two_equal_methods_are_told_apart_no_more_often_than_is_said(seeds: int, solves: float | None) -> None:
    generator, trials = np.random.default_rng(8), 1000
    values = generator.normal(size=(2, trials, seeds))
    if solves is not None:
        values = 0.1 * values + (generator.random(values.shape) < solves)
    assert np.mean([welch(*pair)[3] < 0.05 for pair in zip(*values, strict=True)]) < 0.075


def test_the_area_is_the_mean_height_over_frames() -> None:
    assert area_under_curve([0, 100], [2, 4]) == 3
    assert area_under_curve([0, 10, 100], [0, 0, 9]) == pytest.approx(90 * 4.5 / 100)
    x = np.linspace(0, 5e6, 2001)
    assert area_under_curve(x, (x / 5e6) ** 2) == pytest.approx(1 / 3, rel=1e-5)
    assert area_under_curve([500], [7]) == 7


def test_frames_that_do_not_increase_are_refused() -> None:
    with pytest.raises(ValueError, match="increase"):
        area_under_curve([0, 10, 10], [1, 2, 3])
    with pytest.raises(ValueError, match="one length"):
        area_under_curve([0, 10], [1])
