"""Confidence intervals and verdicts on samples whose true ratio is known."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from fastdiff.bench.stats import (
    LEAST,
    Estimate,
    across_processes,
    between_runs,
    judge,
    mean,
    mean_ratio,
    speedup,
)

ROUNDS, PAIRS, FLOOR = 15, 6, 0.03


def samples(rng, factor=1.0):
    """Times of two backends on a machine whose speed varies threefold; the second takes `factor`
    times as long."""
    drift = rng.uniform(1, 3, ROUNDS)
    first, second = (drift * np.exp(rng.normal(0, 0.03, ROUNDS)) for _ in range(2))
    return list(10 * first), list(10 * factor * second)


def pairs(rng, factor=1.0, own=0.01, noise=0.03, count=PAIRS):
    """Times of process pairs; each process has a speed of its own for all of its rounds."""
    base, new = [], []
    for _ in range(count):
        speeds = np.exp(rng.normal(0, own, 2))
        drift = rng.uniform(1, 3, ROUNDS)
        base.append(drift * speeds[0] * np.exp(rng.normal(0, noise, ROUNDS)))
        new.append(factor * drift * speeds[1] * np.exp(rng.normal(0, noise, ROUNDS)))
    return base, new


def rounds_alone(base, new):
    """The estimate if every round, not every process pair, were a sample."""
    return between_runs([1.0] * len(base), np.array(new) / np.array(base))


def verdicts(found):
    return [judged.verdict for judged in found]


def test_the_interval_of_equal_backends_has_its_coverage():
    rng = np.random.default_rng(1)
    ratios = [speedup(*samples(rng)) for _ in range(150)]
    held = np.mean([r.lo <= 1 <= r.hi for r in ratios])
    assert held >= 0.90  # nominally 95%; 150 intervals fall below 90% once in 400 runs


def test_a_slowdown_of_a_tenth_is_found_every_time():
    rng = np.random.default_rng(2)
    ratios = [speedup(*samples(rng, factor=1.1)) for _ in range(50)]
    assert all(r.hi < 1 for r in ratios)
    assert np.median([r.median for r in ratios]) == pytest.approx(1 / 1.1, rel=0.01)


def test_equal_ratios_need_no_interval():
    ratio = speedup([10.0, 30.0, 20.0], [5.0, 15.0, 10.0])
    assert (ratio.median, ratio.lo, ratio.hi) == (2.0, 2.0, 2.0)


def test_the_same_samples_give_the_same_interval():
    pair = samples(np.random.default_rng(3))
    assert speedup(*pair) == speedup(*pair)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_too_few_or_unpaired_samples_are_refused(first, second):
    with pytest.raises(ValueError, match="at least two"):
        speedup(first, second)


@pytest.mark.parametrize(("own", "count"), [(0.0, PAIRS), (0.02, PAIRS), (0.02, 25)])
def test_the_interval_of_process_pairs_has_its_coverage(own, count):
    rng = np.random.default_rng(4)
    estimates = [across_processes(*pairs(rng, 1.07, own, count=count)) for _ in range(600)]
    held = np.mean([lo <= np.log(1.07) <= hi for lo, hi in (e.interval(0.05) for e in estimates)])
    assert held == pytest.approx(0.95, abs=0.03)  # 3.3 standard errors


def test_one_disturbed_pair_among_many_does_not_hide_a_change():
    """One of twenty processes takes seven times as long, in either state."""
    rng = np.random.default_rng(16)
    for hit in (0, 1):
        sides = pairs(rng, 1.08, count=20)
        sides[hit][7] = [7 * ms for ms in sides[hit][7]]
        (found,) = judge([across_processes(*sides)], [FLOOR])
        assert found.verdict == "slower"
        assert found.ratio.median == pytest.approx(1.08, rel=0.02)


def test_rounds_as_samples_would_give_intervals_that_are_too_narrow():
    """This is why the process pair is the unit: with rounds, four of ten intervals miss."""
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        base, new = pairs(rng, own=0.02)
        lo, hi = rounds_alone(np.ravel(base), np.ravel(new)).interval(0.05)
        missed += not lo <= 0 <= hi
    assert missed / 200 > 0.25


def test_a_geometric_mean_is_between_the_ends_that_students_t_gives_its_logarithm():
    rng = np.random.default_rng(8)
    below, logs = rng.uniform(1, 9, 200), rng.normal(0.2, 0.5, 200)
    found = mean_ratio(below * np.exp(logs), below)
    assert found.median == pytest.approx(np.exp(logs.mean()))
    lo, hi = Estimate(logs.mean(), logs.std(ddof=1) / 200**0.5, 200).interval(0.05)
    assert np.log([found.lo, found.hi]) == pytest.approx([lo, hi], abs=0.01)


def test_a_bootstrap_of_six_units_is_too_narrow_and_students_t_is_not():
    rng = np.random.default_rng(6)
    units = rng.normal(0, 1, (500, 6))
    ends = bootstrap(
        (units,), np.mean, axis=1, method="percentile", n_resamples=999, rng=rng
    ).confidence_interval
    by_t = [Estimate(u.mean(), u.std(ddof=1) / 6**0.5, 6).interval(0.05) for u in units]
    assert np.mean((ends.low <= 0) & (ends.high >= 0)) < 0.91
    assert np.mean([lo <= 0 <= hi for lo, hi in by_t]) == pytest.approx(0.95, abs=0.03)


def test_the_standard_error_of_a_median_is_at_most_15_percent_above_a_bootstraps():
    base, new = samples(np.random.default_rng(7), 1.1)
    logs = np.log(np.array(new) / base)
    drawn = bootstrap((logs,), np.median, n_resamples=20_000, rng=np.random.default_rng(0))
    estimate = rounds_alone(base, new)
    assert estimate.log == np.median(logs)
    assert 1.0 <= estimate.error / drawn.standard_error <= 1.15


@pytest.mark.parametrize("rows", [1, 20])
def test_no_false_alarm_among_many_rows_without_a_floor(rows):
    """Of 300 reports without a change at most one in twenty claims one, with 1 row or with 20."""
    rng = np.random.default_rng(8)
    alarms = 0
    for _ in range(300):
        found = judge([across_processes(*pairs(rng)) for _ in range(rows)], [1e-9] * rows)
        alarms += bool({"slower", "faster"} & set(verdicts(found)))
    assert alarms / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_one_slow_row_among_many_is_the_only_one_called_slower():
    rng = np.random.default_rng(9)
    right = 0
    for _ in range(50):
        rows = [across_processes(*pairs(rng)) for _ in range(19)]
        found = verdicts(judge([*rows, across_processes(*pairs(rng, 1.15))], [FLOOR] * 20))
        right += found[-1] == "slower" and "slower" not in found[:-1]
    assert right >= 48


def test_the_verdict_follows_from_where_the_interval_lies():
    rng = np.random.default_rng(10)
    edges = 1 / (1 + FLOOR), 1 + FLOOR
    seen = set()
    for factor in (0.8, 0.95, 0.97, 1.0, 1.02, 1.03, 1.05, 1.3):
        for rows in (1, 8):
            estimates = [across_processes(*pairs(rng, factor)) for _ in range(rows)]
            for found in judge(estimates, [FLOOR] * rows):
                inside = edges[0] <= found.ratio.lo and found.ratio.hi <= edges[1]
                expected = (
                    "slower"
                    if found.ratio.lo > edges[1]
                    else "faster"
                    if found.ratio.hi < edges[0]
                    else "same"
                    if inside
                    else "inconclusive"
                )
                assert found.verdict == expected
                assert (found.missing > 0) == (expected == "inconclusive")
                seen.add(expected)
    assert seen == {"slower", "faster", "same", "inconclusive"}


def test_a_faster_state_is_the_inverse_of_a_slower_one():
    base, new = pairs(np.random.default_rng(11), 1.2)
    (there,), (back,) = (
        judge([across_processes(*sides)], [FLOOR]) for sides in ((base, new), (new, base))
    )
    assert (there.verdict, back.verdict) == ("slower", "faster")
    assert back.ratio.lo == pytest.approx(1 / there.ratio.hi)
    assert back.ratio.median == pytest.approx(1 / there.ratio.median)


def test_the_stated_number_of_further_samples_settles_a_verdict():
    """At least half of the time: the estimate itself rests on random samples."""
    rng = np.random.default_rng(12)
    settled = 0
    for _ in range(40):
        base, new = pairs(rng, 1.05, own=0.02)
        (found,) = judge([across_processes(base, new)], [FLOOR])
        if found.verdict == "inconclusive":
            for _ in range(-(-found.missing // PAIRS)):
                more = pairs(rng, 1.05, own=0.02)
                base, new = base + more[0], new + more[1]
            (found,) = judge([across_processes(base, new)], [FLOOR])
        settled += found.verdict == "slower"
    assert settled >= 20


@pytest.mark.parametrize("count", range(1, LEAST))
def test_fewer_pairs_than_the_minimum_are_inconclusive(count):
    base, new = [[10.0]] * count, [[20.0]] * count
    (found,) = judge([across_processes(base, new)], [FLOOR])
    assert found.verdict == "inconclusive"
    assert found.missing >= LEAST - count
    assert (
        judge([across_processes([[10.0]] * LEAST, [[20.0]] * LEAST)], [FLOOR])[0].verdict
        == "slower"
    )


def test_equal_samples_are_called_the_same():
    (found,) = judge([across_processes([[5.0]] * 6, [[5.0]] * 6)], [FLOOR])
    assert found.verdict == "same"
    assert (found.ratio.lo, found.ratio.hi) == (1.0, 1.0)


def test_eager_as_a_yardstick_cancels_the_machines_speed():
    """The second run's machine is half as fast, and the measured state a tenth slower."""
    rng = np.random.default_rng(13)
    eager, ours = (np.exp(rng.normal(0, 0.02, 40)) for _ in range(2))
    eager_later, ours_later = (2 * np.exp(rng.normal(0, 0.02, 40)) for _ in range(2))
    related = between_runs(ours, 1.1 * ours_later, eager, eager_later)
    assert np.exp(related.log) == pytest.approx(1.1, rel=0.02)
    lo, hi = related.interval(0.05)
    assert lo < np.log(1.1) < hi
    alone = between_runs(ours, 1.1 * ours_later)
    assert np.exp(alone.log) == pytest.approx(2.2, rel=0.02)


def test_the_interval_between_two_runs_has_its_coverage():
    rng = np.random.default_rng(14)
    held = []
    for _ in range(300):
        runs = [np.exp(rng.normal(0, 0.05, 21)) for _ in range(2)]
        lo, hi = between_runs(*runs).interval(0.05)
        held.append(lo <= 0 <= hi)
    assert np.mean(held) >= 0.93


def test_each_row_has_its_own_floor():
    rng = np.random.default_rng(17)
    estimates = [across_processes(*pairs(rng, 1.1)) for _ in range(2)]
    assert verdicts(judge(estimates, [FLOOR, 0.25])) == ["slower", "same"]


def test_two_contradicting_pairs_have_a_wide_but_finite_interval():
    (found,) = judge([across_processes([[1.0]] * 2, [[1.0], [9.0]])], [FLOOR])
    assert found.verdict == "inconclusive"
    assert np.isfinite(found.ratio.hi)


def test_the_mean_of_ratios_with_correlated_errors_has_its_coverage():
    rng = np.random.default_rng(15)
    held = []
    for _ in range(300):
        rows = [across_processes(*pairs(rng, factor)) for factor in (1.0, 1.1, 1.21)]
        overall = mean(rows)
        assert overall.log == pytest.approx(np.mean([row.log for row in rows]))
        lo, hi = overall.interval(0.05)
        held.append(lo <= np.log(1.1) <= hi)
        assert overall.error == pytest.approx(np.mean([row.error for row in rows]))
    assert np.mean(held) >= 0.93
