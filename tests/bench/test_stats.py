"""Intervals against samples whose true ratio is known."""

import numpy as np
import pytest

from fastdiff.bench.stats import speedup

ROUNDS = 15


def samples(rng, factor=1.0):
    """Two contenders on a machine whose speed wanders threefold; the second `factor` as slow."""
    drift = rng.uniform(1, 3, ROUNDS)
    first, second = (drift * np.exp(rng.normal(0, 0.03, ROUNDS)) for _ in range(2))
    return list(10 * first), list(10 * factor * second)


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
