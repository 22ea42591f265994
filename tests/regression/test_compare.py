"""Verdicts on two documents: changes are called, and what cannot be compared says why."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from command import run
from regression.files import BENCH, COUNTS, PAIRED, STATIC, VERSIONS, bench_row

from fastdiff.regression.compare import compare
from fastdiff.regression.documents import Pair, pair_of, read, read_pair


@pytest.fixture
def against(tmp_path):
    """against(base, new): the comparison of two documents in files."""

    def found(base, new, floor=None):
        paths = []
        for name, document in (("base.json", base), ("new.json", new)):
            paths.append(tmp_path / name)
            paths[-1].write_text(json.dumps(document))
        return compare(read_pair(*paths), "", floor)

    return found


def lines(comparison):
    return {line.name: line for line in comparison.lines}


def paired(factor, pairs=8, seed=0, **more):
    """A paired document whose new state takes `factor` times as long."""
    rng = np.random.default_rng(seed)
    base = [list(5 * np.exp(rng.normal(0, 0.01, 10))) for _ in range(pairs)]
    new = [list(factor * 5 * np.exp(rng.normal(0, 0.01, 10))) for _ in range(pairs)]
    times = [{"name": "fastdiff · step", "unit": "ms", "base": base, "new": new}]
    rows = {"base": ["fastdiff · step"], "new": ["fastdiff · step"]}
    counts = {"base": {}, "new": {}}
    empty = {"times": times, "rows": rows, "counts": counts, "wrong": {"base": {}, "new": {}}}
    return PAIRED | empty | more


@pytest.mark.parametrize(
    ("factor", "verdict", "code"),
    [(1.0, "same", 0), (1.1, "slower", 1), (0.9, "faster", 0), (1.03, "inconclusive", 3)],
)
def test_verdicts_and_exit_codes_of_paired_times(tmp_path, factor, verdict, code):
    found = compare(pair_of(paired(factor)), "")
    assert [line.verdict for line in found.lines] == [verdict]
    assert found.exit_code == code
    assert found.geomean.median == pytest.approx(factor, rel=0.01)
    (line,) = found.lines
    assert line.lo < line.ratio < line.hi
    assert line.ratio == pytest.approx(factor, rel=0.01)
    assert bool(line.note) == (verdict == "inconclusive")
    file = tmp_path / "paired.json"
    file.write_text(json.dumps(paired(factor)))
    printed, out, _ = run("report", file)
    assert printed == code
    assert f"exit code {code}" in out


def test_the_user_sets_the_floor():
    assert compare(pair_of(paired(1.1)), "", floor=0.2).lines[0].verdict == "same"
    assert compare(pair_of(paired(1.02, pairs=20)), "", floor=0.005).lines[0].verdict == "slower"


def test_few_pairs_are_inconclusive_and_say_how_many_are_missing():
    (line,) = compare(pair_of(paired(1.5, pairs=3)), "").lines
    assert line.verdict == "inconclusive"
    assert line.note == "about 2 more process pairs would settle it"


def test_one_process_pair_is_not_enough_however_many_rounds():
    (line,) = compare(pair_of(paired(1.2, pairs=1)), "").lines
    assert (line.verdict, line.note) == (
        "inconclusive",
        "about 4 more process pairs would settle it",
    )


def test_a_first_picture_has_a_wider_floor_and_is_not_in_the_mean():
    document = paired(1.0)
    first = [[100.0]] * 8, [[115.0]] * 8
    name = "fastdiff · first picture"
    document["times"].append({"name": name, "unit": "ms", "base": first[0], "new": first[1]})
    found = compare(pair_of(document), "")
    assert lines(found)[name].verdict == "same"
    assert found.geomean.median == pytest.approx(1.0, abs=0.01)
    document["times"][1]["new"] = [[130.0]] * 8
    assert lines(compare(pair_of(document), ""))[name].verdict == "slower"


def test_a_row_of_only_one_state_is_incomparable():
    document = paired(1.0)
    document["rows"] = {"base": ["fastdiff · step"], "new": ["fastdiff · step", "ort · step"]}
    found = compare(pair_of(document), "")
    assert lines(found)["ort · step"].note == "only in NEW"
    assert found.exit_code == 3


@pytest.mark.parametrize(
    ("side", "verdict", "code"), [("new", "slower", 1), ("base", "incomparable", 3)]
)
def test_a_wrong_picture_is_a_regression_without_a_speed(side, verdict, code):
    document = paired(1.0, times=[])
    document["wrong"] = {"base": {}, "new": {}} | {side: {"fastdiff": "it is 20 dB from eager's"}}
    found = compare(pair_of(document), "")
    (line,) = found.lines
    assert (line.name, line.verdict) == ("fastdiff · result", verdict)
    assert "20 dB" in line.note
    assert found.exit_code == code


COUNTED = {
    "launches": (165, 166, "slower"),
    "bytes": (165, 164, "faster"),
    "recordings": (0, 1, "slower"),
    "flops": (5, 5, "same"),
    "peak bytes": (1000, 1009, "same"),
    "occupancy": (0.5, 0.25, "slower"),
    "load": (8, 16, "faster"),
    "generation": (2, 1, "slower"),
}


@pytest.mark.parametrize("unit", COUNTED)
def test_counters_are_exact_but_for_peak_bytes_which_vary(unit):
    base, new, verdict = COUNTED[unit]
    document = paired(1.0)
    document["counts"] = {"base": {"it": [base, unit]}, "new": {"it": [new, unit]}}
    assert lines(compare(pair_of(document), ""))["it"].verdict == verdict


def test_peak_bytes_beyond_their_variation_are_a_regression():
    document = paired(1.0)
    document["counts"] = {"base": {"it": [1000, "peak bytes"]}, "new": {"it": [1011, "peak bytes"]}}
    assert lines(compare(pair_of(document), ""))["it"].verdict == "slower"


def test_a_base_without_counters_is_noted_and_passes():
    document = paired(1.0)
    document["counts"] = {"base": {}, "new": {"step · launches": [5, "launches"]}}
    found = compare(pair_of(document), "")
    assert found.differences == ("BASE has no counters, so none are compared",)
    assert found.exit_code == 0


def test_counters_missing_in_the_new_state_do_not_pass():
    document = paired(1.0)
    document["counts"] = {"base": {"step · launches": [5, "launches"]}, "new": {}}
    found = compare(pair_of(document), "")
    assert lines(found)["counters"].note == "NEW has no counters, but BASE does"
    assert found.exit_code == 3


def test_a_picture_wrong_in_both_states_is_no_regression():
    document = paired(1.0, times=[])
    document["wrong"] = {side: {"fastdiff": "it is 20 dB from eager's"} for side in ("base", "new")}
    assert compare(pair_of(document), "").exit_code == 3


def changed(document, **fields):
    return copy.deepcopy(document) | fields


def test_every_static_number_is_a_gate(against):
    assert against(STATIC, STATIC).exit_code == 0
    worse = {
        "registers": 255,
        "spills": 8,
        "shared": 100_000,
        "occupancy": 0.125,
        "load": 8,
        "store": 4,
        "narrow": 3,
        "mma": "mma.sync",
    }
    for field, value in worse.items():
        row = STATIC["rows"][0] | {field: value}
        found = against(STATIC, changed(STATIC, rows=[row]))
        called = [line.name for line in found.lines if line.verdict == "slower"]
        assert len(called) == 1, field
        assert called[0].endswith("matrix instructions" if field == "mma" else field)
        assert found.exit_code == 1
        assert against(changed(STATIC, rows=[row]), STATIC).exit_code == 0


def test_counts_of_other_versions_pass_only_if_equal(against):
    update = VERSIONS | {"torch": "2.14.1"}
    assert against(COUNTS, changed(COUNTS, versions=update)).exit_code == 0
    more = changed(COUNTS, versions=update)
    more["rows"][1]["counts"]["step"]["conv"]["launches"] += 1
    found = against(COUNTS, more)
    assert found.exit_code == 3
    line = lines(found)["fastdiff · step · launches"]
    assert line.verdict == "incomparable"
    assert line.note.startswith("torch is 2.13.0+cpu in BASE and 2.14.1 in NEW")
    more["versions"] = VERSIONS
    assert against(COUNTS, more).exit_code == 1


def test_a_row_missing_in_either_state_fails_the_gate(against):
    more = changed(STATIC, rows=[*STATIC["rows"], STATIC["rows"][0] | {"case": "sd15-32-self"}])
    for base, new, where in ((STATIC, more, "NEW"), (more, STATIC, "BASE")):
        found = against(base, new)
        called = [line for line in found.lines if line.verdict == "slower"]
        assert len(called) == 8
        assert called[0].note.startswith(f"only in {where}: if this is intended, count BASE again")
    older = changed(STATIC, versions=VERSIONS | {"triton": "3.8.0"})
    assert against(older, more).exit_code == 3


def test_counts_with_and_without_draw_are_compared_where_both_have_numbers(against):
    plain = changed(COUNTS, rows=[row | {"drawn": None} for row in COUNTS["rows"]])
    found = against(plain, COUNTS)
    assert {line.verdict for line in found.lines} == {"same"}
    assert found.exit_code == 0
    (sentence,) = found.differences
    assert sentence.startswith("only NEW was counted with --draw, so recordings, compilations and")
    found = against(COUNTS, plain)  # NEW must not drop a gate that BASE has
    (line,) = (line for line in found.lines if line.verdict != "same")
    assert (line.name, line.verdict, found.exit_code) == ("drawn pictures", "incomparable", 3)
    assert line.note.endswith("count NEW with --draw, too")
    more = changed(plain)
    more["rows"][1]["counts"]["step"]["conv"]["launches"] += 1
    assert against(COUNTS, more).exit_code == 1


def test_counts_of_another_case_are_incomparable(against):
    on_gpu = changed(COUNTS, case="demo, float16, cuda")
    on_gpu["rows"][1]["counts"] |= {"step_kernels": 9, "image_kernels": 9}
    found = against(COUNTS, on_gpu)
    assert {line.verdict for line in found.lines} == {"incomparable"}
    assert found.exit_code == 3


def test_peak_memory_is_not_compared_across_machines(against):
    elsewhere = changed(COUNTS, machine=COUNTS["machine"] | {"cpu": "Intel"})
    elsewhere["rows"][1]["drawn"]["peak_bytes"] *= 2
    found = against(COUNTS, elsewhere)
    assert found.exit_code == 3
    assert lines(found)["fastdiff · peak memory"].note.startswith("cpu is AMD EPYC in BASE")
    elsewhere["rows"][1]["drawn"]["again"] = 1  # recordings do not depend on the machine
    assert against(COUNTS, elsewhere).exit_code == 1


DIFFERENT = {
    "cpu is AMD EPYC in BASE and Intel in NEW": {"machine": BENCH["machine"] | {"cpu": "Intel"}},
    "threads is 2 in BASE and 1 in NEW": {"machine": BENCH["machine"] | {"threads": 1}},
    "torch is 2.13.0+cpu in BASE and 2.14.1 in NEW": {"versions": VERSIONS | {"torch": "2.14.1"}},
    "BASE is demo, float32 and NEW is demo, bfloat16": {
        "rows": [row | {"case": "demo, bfloat16"} for row in BENCH["rows"]]
    },
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_times_of_other_machines_or_versions_are_not_compared(against, difference):
    found = against(BENCH, changed(BENCH, **DIFFERENT[difference]))
    timed = [line for line in found.lines if line.kind == "time"]
    assert {line.verdict for line in timed} == {"incomparable"}
    assert all(line.note.startswith(difference) for line in timed)
    assert difference in found.differences
    assert found.geomean is None
    assert found.exit_code == 3


def test_two_different_cases_are_incomparable(against):
    other = changed(COUNTS, case="sd15, float16")
    found = against(COUNTS, other)
    assert {line.verdict for line in found.lines} == {"incomparable"}
    assert found.exit_code == 3


def noisy(rng, speed, slow=1.0, n=21):
    eager = speed * 10 * np.exp(rng.normal(0, 0.02, n))
    ours = slow * speed * 4 * np.exp(rng.normal(0, 0.02, n))
    rows = [bench_row("eager", list(eager)), bench_row("fastdiff", list(ours))]
    return changed(BENCH, rows=rows)


def test_separate_runs_are_compared_relative_to_eager_with_a_wider_floor(against):
    """The second run's machine was half as fast, which is no regression of the code."""
    rng = np.random.default_rng(0)
    found = against(noisy(rng, 1.0), noisy(rng, 2.0))
    assert (found.floor, found.paired, found.exit_code) == (0.10, False, 0)
    assert found.geomean.median == pytest.approx(1.0, abs=0.03)
    found = against(noisy(rng, 1.0), noisy(rng, 2.0, slow=1.3))
    assert found.exit_code == 1
    assert {line.verdict for line in found.lines if line.kind == "time"} == {"slower"}


def test_lines_are_sorted_worst_first_and_none_is_lost():
    rng = np.random.default_rng(1)
    factors = {"a": 1.0, "b": 1.5, "c": 0.8, "d": 1.2}
    base = {name: [list(np.exp(rng.normal(0, 0.01, 10))) for _ in range(8)] for name in factors}
    times = [
        {"name": n, "unit": "ms", "base": base[n], "new": [list(f * np.array(p)) for p in base[n]]}
        for n, f in factors.items()
    ]
    document = paired(1.0, times=times, rows={"base": list(factors), "new": list(factors)})
    found = compare(pair_of(document), "")
    assert [line.name for line in found.lines] == ["b", "d", "c", "a"]
    assert found.geomean.median == pytest.approx((1.5 * 0.8 * 1.2) ** 0.25)


def test_a_comparison_of_nothing_does_not_pass(tmp_path):
    document = paired(1.0, times=[], rows={"base": [], "new": []})
    found = compare(pair_of(document), "")
    assert found.lines == ()
    assert found.exit_code == 3


def test_a_state_compared_with_itself_is_the_same(tmp_path):
    path = tmp_path / "x.json"
    for document in (COUNTS, STATIC):
        path.write_text(json.dumps(document))
        side = read(path)
        found = compare(Pair(side, replace(side), taken_in_turn=False), "")
        assert {line.verdict for line in found.lines} == {"same"}
