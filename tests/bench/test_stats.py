"""Intervals and verdicts against samples whose true ratio is known."""

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
    speedup,
)

ROUNDS, PAIRS, FLOOR = 15, 6, 0.03


def samples(rng, factor=1.0):
    """Two contenders on a machine whose speed wanders threefold; the second `factor` as slow."""
    drift = rng.uniform(1, 3, ROUNDS)
    first, second = (drift * np.exp(rng.normal(0, 0.03, ROUNDS)) for _ in range(2))
    return list(10 * first), list(10 * factor * second)


def pairs(rng, factor=1.0, own=0.01, noise=0.03, count=PAIRS):
    """Process pairs; each process is a little faster or slower than its like, all rounds long."""
    base, new = [], []
    for _ in range(count):
        speeds = np.exp(rng.normal(0, own, 2))
        drift = rng.uniform(1, 3, ROUNDS)
        base.append(drift * speeds[0] * np.exp(rng.normal(0, noise, ROUNDS)))
        new.append(factor * drift * speeds[1] * np.exp(rng.normal(0, noise, ROUNDS)))
    return base, new


def rounds_alone(base, new):
    """What one would say who takes each round for a sample of its own."""
    return between_runs([1.0] * len(base), np.array(new) / np.array(base))


def verdicts(found):
    return [judged.verdict for judged in found]


def test_same_against_same_holds_one_as_often_as_it_says():
    rng = np.random.default_rng(1)
    ratios = [speedup(*samples(rng)) for _ in range(150)]
    held = np.mean([r.lo <= 1 <= r.hi for r in ratios])
    assert held >= 0.90  # 95% said; 150 draws of it fall below 90% once in 400


def test_a_slow_down_of_a_tenth_is_found_every_time():
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
def test_too_few_or_unpaired_samples(first, second):
    with pytest.raises(ValueError, match="at least two"):
        speedup(first, second)


@pytest.mark.parametrize(("own", "count"), [(0.0, PAIRS), (0.02, PAIRS), (0.02, 25)])
def test_the_interval_of_process_pairs_holds_the_truth_as_often_as_it_says(own, count):
    rng = np.random.default_rng(4)
    estimates = [across_processes(*pairs(rng, 1.07, own, count=count)) for _ in range(600)]
    held = np.mean([lo <= np.log(1.07) <= hi for lo, hi in (e.interval(0.05) for e in estimates)])
    assert held == pytest.approx(0.95, abs=0.03)  # 3.3 standard errors


def test_a_disturbed_pair_among_many_does_not_hide_a_change():
    """One of twenty had a neighbour: it is seven times as slow, whichever state it hit."""
    rng = np.random.default_rng(16)
    for hit in (0, 1):
        sides = pairs(rng, 1.08, count=20)
        sides[hit][7] = [7 * ms for ms in sides[hit][7]]
        (found,) = judge([across_processes(*sides)], [FLOOR])
        assert found.verdict == "slower"
        assert found.ratio.median == pytest.approx(1.08, rel=0.02)


def test_rounds_of_processes_with_speeds_of_their_own_would_claim_too_much():
    """What the process pair as the unit is for: by rounds, four of ten intervals miss."""
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        base, new = pairs(rng, own=0.02)
        lo, hi = rounds_alone(np.ravel(base), np.ravel(new)).interval(0.05)
        missed += not lo <= 0 <= hi
    assert missed / 200 > 0.25


def test_a_bootstrap_of_six_units_is_too_narrow_and_students_t_is_not():
    rng = np.random.default_rng(6)
    units = rng.normal(0, 1, (500, 6))
    ends = bootstrap(
        (units,), np.mean, axis=1, method="percentile", n_resamples=999, rng=rng
    ).confidence_interval
    by_t = [Estimate(u.mean(), u.std(ddof=1) / 6**0.5, 6).interval(0.05) for u in units]
    assert np.mean((ends.low <= 0) & (ends.high >= 0)) < 0.91
    assert np.mean([lo <= 0 <= hi for lo, hi in by_t]) == pytest.approx(0.95, abs=0.03)


def test_the_median_of_rounds_has_a_bootstraps_error_or_a_little_more():
    base, new = samples(np.random.default_rng(7), 1.1)
    logs = np.log(np.array(new) / base)
    drawn = bootstrap((logs,), np.median, n_resamples=20_000, rng=np.random.default_rng(0))
    estimate = rounds_alone(base, new)
    assert estimate.log == np.median(logs)
    assert 1.0 <= estimate.error / drawn.standard_error <= 1.15


@pytest.mark.parametrize("rows", [1, 20])
def test_no_false_alarm_among_many_rows_without_a_floor(rows):
    """Of 300 reports on nothing at most one in twenty calls something, however many rows it has."""
    rng = np.random.default_rng(8)
    alarms = 0
    for _ in range(300):
        found = judge([across_processes(*pairs(rng)) for _ in range(rows)], [1e-9] * rows)
        alarms += bool({"slower", "faster"} & set(verdicts(found)))
    assert alarms / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_one_slow_row_among_many_is_the_one_that_is_called():
    rng = np.random.default_rng(9)
    right = 0
    for _ in range(50):
        rows = [across_processes(*pairs(rng)) for _ in range(19)]
        found = verdicts(judge([*rows, across_processes(*pairs(rng, 1.15))], [FLOOR] * 20))
        right += found[-1] == "slower" and "slower" not in found[:-1]
    assert right >= 48


def test_a_verdict_is_where_the_interval_lies():
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


def test_as_many_more_samples_as_it_says_do_settle_it():
    """Half of the time, for the samples seen so far are a chance, too."""
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
def test_fewer_than_the_least_call_nothing_however_alike(count):
    base, new = [[10.0]] * count, [[20.0]] * count
    (found,) = judge([across_processes(base, new)], [FLOOR])
    assert found.verdict == "inconclusive"
    assert found.missing >= LEAST - count
    assert (
        judge([across_processes([[10.0]] * LEAST, [[20.0]] * LEAST)], [FLOOR])[0].verdict
        == "slower"
    )


def test_equal_samples_are_the_same():
    (found,) = judge([across_processes([[5.0]] * 6, [[5.0]] * 6)], [FLOOR])
    assert found.verdict == "same"
    assert (found.ratio.lo, found.ratio.hi) == (1.0, 1.0)


def test_a_yardstick_cancels_what_the_machine_was_doing():
    """The second run's machine is half as fast; what is measured is a tenth slower."""
    rng = np.random.default_rng(13)
    eager, ours = (np.exp(rng.normal(0, 0.02, 40)) for _ in range(2))
    eager_later, ours_later = (2 * np.exp(rng.normal(0, 0.02, 40)) for _ in range(2))
    related = between_runs(ours, 1.1 * ours_later, eager, eager_later)
    assert np.exp(related.log) == pytest.approx(1.1, rel=0.02)
    lo, hi = related.interval(0.05)
    assert lo < np.log(1.1) < hi
    alone = between_runs(ours, 1.1 * ours_later)
    assert np.exp(alone.log) == pytest.approx(2.2, rel=0.02)


def test_two_runs_are_no_surer_than_their_rounds():
    rng = np.random.default_rng(14)
    held = []
    for _ in range(300):
        runs = [np.exp(rng.normal(0, 0.05, 21)) for _ in range(2)]
        lo, hi = between_runs(*runs).interval(0.05)
        held.append(lo <= 0 <= hi)
    assert np.mean(held) >= 0.93


def test_every_row_has_a_floor_of_its_own():
    rng = np.random.default_rng(17)
    estimates = [across_processes(*pairs(rng, 1.1)) for _ in range(2)]
    assert verdicts(judge(estimates, [FLOOR, 0.25])) == ["slower", "same"]


def test_two_pairs_that_contradict_each_other_have_an_interval_without_end():
    (found,) = judge([across_processes([[1.0]] * 2, [[1.0], [9.0]])], [FLOOR])
    assert found.verdict == "inconclusive"
    assert np.isfinite(found.ratio.hi)


def test_the_mean_of_ratios_that_may_err_together():
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
