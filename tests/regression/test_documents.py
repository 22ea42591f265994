"""Result files are read, or refused in one sentence: no damaged or foreign file gets a verdict."""

import copy
import json
import math
import subprocess
import sys

import pytest
from command import environment, run
from regression.files import BENCH, COUNTS, PAIRED, STATIC, bench_row

from fastdiff.errors import UserError
from fastdiff.regression.documents import Timed, pair_of, read, read_pair


@pytest.fixture
def file(tmp_path):
    def write(document, name="x.json"):
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def test_times_of_a_bench_are_relative_to_its_eager_row(file):
    side = read(file(BENCH))
    assert side.case == "demo, float32"
    step = side.times["fastdiff · step against eager"]
    assert step == Timed(((4.0, 5.0, 4.5, 4.2, 4.1, 4.3),), (10.0,) * 6)
    assert side.times["fastdiff · image against eager"].yardstick == (20.0,) * 6
    assert not any(name.startswith("eager · step") for name in side.times)
    assert side.counts["fastdiff · peak memory"] == (1000, "peak bytes")


def test_a_backend_that_failed_its_receipt_is_wrong_and_has_no_time(file):
    row = bench_row("fastdiff", [], receipt={"passed": False})
    side = read(file(BENCH | {"rows": [BENCH["rows"][0], row]}))
    assert side.wrong == {"fastdiff": "it failed its receipt"}
    assert side.times == {}


def test_counts_are_fastdiffs_totals_and_numbers_of_drawn_pictures(file):
    counts = read(file(COUNTS)).counts
    assert counts["fastdiff · step · launches"] == (5, "launches")
    assert counts["fastdiff · step · bytes"] == (108, "bytes")
    assert counts["fastdiff · step · host reads"] == (2, "host reads")
    assert counts["fastdiff · image · flops"] == (9, "flops")
    assert counts["fastdiff · recordings · another size"] == (2, "recordings")
    assert counts["fastdiff · peak memory"] == (1234, "peak bytes")
    assert not any(name.startswith("eager") for name in counts)


def test_a_static_rows_name_holds_all_its_keys(file):
    counts = read(file(STATIC)).counts
    stem = "attention · _attention_kernel · sd15-64-self · float16 · sm_90"
    assert {name.removeprefix(f"{stem} · "): value for name, (value, _) in counts.items()} == {
        "registers": 168,
        "spills": 0,
        "shared": 65536,
        "occupancy": 0.25,
        "load": 16,
        "store": 16,
        "narrow": 2,
        "matrix instructions": 2,
    }


def test_a_paired_file_holds_both_states(file):
    pair = read_pair(file(PAIRED), None)
    assert pair.taken_in_turn
    assert (pair.base.state.name, pair.new.state.commit) == ("main", "abc1234-dirty")
    assert pair.base.times["fastdiff · step"].times == ((5.0, 5.1, 5.2),) * 6
    assert pair.new.times["ort · step"].times == ()
    assert "ort · step" not in pair.base.times
    assert pair.new.counts["fastdiff · step · launches"] == (166, "launches")
    assert pair.new.wrong == {"channels_last": "its picture is 20 dB from eager's"}
    assert pair_of(PAIRED) == pair


def test_a_real_file_of_pytest_benchmark_is_read(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_sum(benchmark):\n    assert benchmark(sum, range(99)) == 4851\n")
    out = tmp_path / "out.json"
    command = f"-m pytest -q -p no:cacheprovider {test} --benchmark-json={out}"
    command += " --benchmark-max-time=0.01 --benchmark-min-rounds=7"
    command = [sys.executable, *command.split()]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    document = json.loads(out.read_text())
    (name, timed), *rest = read(out).times.items()
    assert not rest
    assert name.endswith("test_it.py::test_sum")
    stats = document["benchmarks"][0]["stats"]
    assert timed.times == (tuple(1e3 * second for second in stats.pop("data")),)
    # now without "data", as pytest-benchmark writes it by default
    out.write_text(json.dumps(document))
    assert read(out).times[name].times == ((1e3 * stats["median"],),)


def damaged(path, value):
    """PAIRED with the item at `path` set to `value`, or deleted if that is None."""
    document = copy.deepcopy(PAIRED)
    *parents, last = path
    place = document
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


DAMAGE = {
    "is not JSON (maximum recursion": "[" * 100_000,
    "is damaged (OverflowError": json.dumps(PAIRED).replace("5.0", "9" * 400, 1),
    "is empty": "",
    "is not JSON": json.dumps(PAIRED)[:-40],
    "holds a JSON list, not an object": [1, 2],
    "is JSON of another kind": {"hello": 1},
    "is of schema 'fastdiff.bench/9'": BENCH | {"schema": "fastdiff.bench/9"},
    "has a sample of nan": damaged(("times", 0, "new", 2, 1), math.nan),
    "has a sample of inf": damaged(("times", 0, "new", 2, 1), math.inf),
    "has a sample of -1.0": damaged(("times", 0, "new", 2, 1), -1.0),
    "has a sample of 0.0": damaged(("times", 0, "base", 0, 0), 0.0),
    "has '5' where a number": damaged(("times", 0, "base", 0, 0), "5"),
    "is damaged (KeyError: 'states')": damaged(("states",), None),
    "is damaged (KeyError: 'new')": damaged(("times", 0, "new"), None),
    "is damaged (TypeError": damaged(("times",), 5),
    "is damaged (AttributeError": damaged(("counts", "base"), [1]),
    "has True where a number": damaged(("counts", "new", "fastdiff · step · launches", 0), True),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_one_sentence(file, message):
    path = file(DAMAGE[message], "damaged.json")
    with pytest.raises(UserError) as caught:
        read_pair(path, None)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    code, out, err = run("report", path)
    assert (code, out) == (2, "")
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("times", 0, "new"), [[5.0, 5.0, 5.0]] * 5),
        (("times", 0, "new", 3), [5.0, 5.0]),
        (("times", 0, "new", 3), []),
    ],
)
def test_unpaired_samples_are_refused(file, path, value):
    code, out, err = run("report", file(damaged(path, value)))
    assert (code, out) == (2, "")
    assert "rounds of BASE and" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([bench_row("fastdiff", [4.0] * 6)], "no row of eager"),
        ([bench_row("eager", [9.0] * 5), bench_row("fastdiff", [4.0] * 6)], "6 rounds, eager 5"),
        ([bench_row("eager", []), bench_row("fastdiff", [4.0])], "fastdiff has no samples"),
    ],
)
def test_a_bench_without_matching_eager_rounds_is_refused(file, rows, message):
    path = file(BENCH | {"rows": rows})
    code, out, err = run("report", path, path)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ((BENCH,), "holds one state; give a second file"),
        ((PAIRED, BENCH), "holds both states; give no second file"),
        ((BENCH, PAIRED), "holds both states; give no second file"),
    ],
)
def test_one_paired_file_or_two_others_are_needed(file, documents, message):
    paths = [file(document, f"{i}.json") for i, document in enumerate(documents)]
    code, out, err = run("report", *paths)
    assert (code, out) == (2, "")
    assert message in err


def test_a_missing_file_is_one_sentence(tmp_path):
    code, out, err = run("report", tmp_path / "no.json", tmp_path / "no.json")
    assert (code, out) == (2, "")
    assert "no.json cannot be read: No such file" in err
