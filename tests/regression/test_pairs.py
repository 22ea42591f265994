"""Comparing two states in process pairs: fair order, no time for wrong rows, unbiased stopping."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from fastdiff.bench.stats import across_processes
from fastdiff.errors import UserError
from fastdiff.regression import pairs, states
from fastdiff.regression.pairs import Settings, Until, race

SETTINGS = Settings("kernels", "cpu", "float32", threads=1)


class Fake:
    """A worker without a process: it reports the times that `ms(side, row)` returns."""

    log: list
    ms: staticmethod
    rows = {"base": ["a", "b"], "new": ["b", "a"]}
    wrong = {"base": {}, "new": {}}

    def __init__(self, place, settings, log):
        self.place, self.side = place, place.name

    def answer(self):
        return {"versions": {"torch": "2"}}

    def ask(self, do, group=None):
        self.log.append((self.side, do, group))
        rows = self.rows[self.side]
        answers = {
            "start": lambda: {"groups": [[row] for row in rows], "once": {"first": 5.0}},
            "check": lambda: {"wrong": self.wrong[self.side]},
            "count": lambda: {"counts": {"launches": [1, "launches"]}},
            "run": lambda: {"ms": {rows[group]: self.ms(self.side, rows[group])}},
            "stop": dict,
        }
        return answers[do]()

    def close(self):
        self.log.append((self.side, "close", None))


@pytest.fixture
def fake(monkeypatch):
    """run(ms, until, …): a race of two fakes on a clock that advances by the reported times."""
    now = [0.0]
    Fake.log = []
    monkeypatch.setattr(pairs, "Worker", Fake)
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: now[0])

    def run(ms, until, gates=pairs.GATES, show=lambda *line: None):
        def reported(side, row):
            value = ms(side, row)
            now[0] += value / 1e3
            return value

        Fake.ms = staticmethod(reported)
        base, new = (states.Place(side, Path(), Path.cwd(), None) for side in ("base", "new"))
        return race(base, new, SETTINGS, until, show, gates)

    return run


def jittering(seed, slow=1.0):
    rng = np.random.default_rng(seed)
    return lambda side, row: 20 * np.exp(rng.normal(0, 0.02)) * (slow if side == "new" else 1)


def test_both_states_run_equally_often_in_random_order(fake):
    done = fake(jittering(0), Until(pairs=8))
    runs = [(side, Fake.rows[side][group]) for side, do, group in Fake.log if do == "run"]
    assert len(runs) % 4 == 0
    for at in range(0, len(runs), 2):  # both states run a row one right after the other
        assert {side for side, _ in runs[at : at + 2]} == {"base", "new"}
        assert len({row for _, row in runs[at : at + 2]}) == 1
    firsts = [runs[at][0] for at in range(0, len(runs), 2)]
    assert 0.3 < firsts.count("base") / len(firsts) < 0.7
    starts = [side for side, do, _ in Fake.log if do == "start"][2:]
    assert {tuple(starts[at : at + 2]) for at in range(0, 16, 2)} == {
        ("base", "new"),
        ("new", "base"),
    }
    assert done.pairs == 8
    assert done.once == {"first": ([[5.0]] * 8, [[5.0]] * 8)}
    for base, new in done.times.values():
        assert len(base) == len(new) == 8
        assert [len(p) for p in base] == [len(p) for p in new]
    assert Fake.log[-2:] == [("base", "close", None), ("new", "close", None)]


def test_a_process_pair_is_timed_for_a_fixed_time(fake):
    done = fake(jittering(1), Until(pairs=2))
    per_round = 4 * 20e-3
    for base, _ in done.times.values():
        for process in base:
            assert len(process) == pytest.approx(pairs.PAIR_S / per_round, abs=2)
    slow = fake(lambda side, row: 5e3, Until(pairs=1))
    assert len(slow.times["a"][0][0]) == pairs.LEAST_ROUNDS


def test_it_ends_when_every_interval_is_narrow_enough(fake):
    done = fake(jittering(2), Until(half_width=0.004, limit_s=1e6))
    for base, new in done.times.values():
        lo, hi = across_processes(base, new).interval(0.05)
        assert hi - lo < 2 * np.log(1.004)
    assert done.pairs > pairs.LEAST


def test_it_ends_within_the_time_limit(fake):
    done = fake(jittering(3), Until(half_width=1e-9, limit_s=30))
    assert 25 < done.seconds <= 30


def test_progress_shows_the_share_done_and_the_widest_interval(fake):
    said = []
    fake(jittering(9), Until(pairs=4), show=lambda line, share=None: said.append((line, share)))
    timed = [(line, share) for line, share in said if share is not None]
    assert [share for _, share in timed] == [0.25, 0.5, 0.75, 1.0]
    assert re.fullmatch(r"pair 4: [ab] \d\.\d{3} \[0\.\d+, 1\.\d+\], the widest of 2", timed[-1][0])


def test_a_visible_change_does_not_end_it_early(fake):
    """For the same interval width, a state twice as slow needs as many pairs as an equal one."""
    numbers = {
        slow: fake(jittering(4, slow), Until(half_width=0.004, limit_s=1e6)).pairs
        for slow in (1.0, 2.0)
    }
    assert numbers[2.0] > pairs.LEAST
    assert numbers[2.0] > 0.7 * numbers[1.0]


def test_wrong_rows_are_not_timed(fake, monkeypatch):
    monkeypatch.setattr(Fake, "wrong", {"base": {}, "new": {"a": "it is out of its budget"}})
    done = fake(jittering(5), Until(pairs=2))
    assert set(done.times) == {"b"}
    assert done.wrong["new"] == {"a": "it is out of its budget"}


def test_rows_of_only_one_state_are_not_timed_but_listed(fake, monkeypatch):
    monkeypatch.setattr(Fake, "rows", {"base": ["b"], "new": ["b", "a"]})
    done = fake(jittering(6), Until(pairs=1))
    assert set(done.times) == {"b"}
    assert done.rows == {"base": ["b"], "new": ["b", "a"]}


def test_states_without_common_rows_end_at_once(fake, monkeypatch):
    monkeypatch.setattr(Fake, "rows", {"base": ["b"], "new": ["a"]})
    assert fake(jittering(7), Until(pairs=9)).pairs == 1


def test_only_the_requested_gate_runs(fake):
    assert fake(jittering(8), Until(pairs=2), gates=("counters",)).times == {}
    assert not any(do == "run" for _, do, _ in Fake.log)
    Fake.log.clear()
    done = fake(jittering(8), Until(pairs=2), gates=("times",))
    assert done.counts == {"base": {}, "new": {}}
    assert not any(do == "count" for _, do, _ in Fake.log)


def real(settings, until=None, **gates):
    place = states.here(Path(__file__).parents[2])
    return race(place, place, settings, until or Until(pairs=1), lambda *line: None, **gates)


# test_report_command.py times a kernel in two processes
@pytest.mark.product
def test_real_processes_time_real_kernels():
    settings = Settings("kernels", "cpu", "float32", threads=1, filter="ada_norm · demo")
    done = real(settings, Until(pairs=2))
    (base, new), *others = done.times.values()
    assert not others
    assert len(base) == len(new) == 2
    assert all(ms > 0 for process in base + new for ms in process)
    assert done.wrong == {"base": {}, "new": {}}
    assert done.versions["base"]["torch"] == done.versions["new"]["torch"]


LIBRARIES = {
    "torch.py": "float32 = None\ndef set_num_threads(number): pass",
    "diffusers.py": """
class DiffusionPipeline:
    def from_pretrained(folder, **how):
        raise OSError(f"{folder} holds no pipeline\\nand this is the second line")
""",
}


def test_a_state_that_cannot_run_says_why_and_leaves_no_process(tmp_path, monkeypatch):
    """Both states import libraries of a few lines, which take no seconds to import."""
    for name, text in LIBRARIES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # other tests may start workers at the same time
    monkeypatch.setenv("STARTED_BY", str(tmp_path))
    settings = Settings("pipelines", "cpu", "float32", 1, backends=("eager",), folder="/nothing")
    with pytest.raises(UserError) as caught:
        real(settings)
    assert str(caught.value) == "here cannot be measured: OSError: /nothing holds no pipeline"
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _started_by(tmp_path, pid)]


def _started_by(mark, pid):
    """Whether another process has the variable STARTED_BY with this value."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return int(pid) != os.getpid() and f"STARTED_BY={mark}".encode() in variables


def test_a_worker_that_exits_is_reported_with_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import sys; sys.exit('the library is broken')")
    monkeypatch.setattr(pairs, "__file__", str(tmp_path / "pairs.py"))
    with pytest.raises(UserError, match="cannot be measured: the library is broken"):
        real(SETTINGS)


# starts two processes; test_a_worker_that_exits_is_reported_with_its_last_line starts none of ours
@pytest.mark.product
def test_a_killed_worker_is_reported_and_does_not_hang(monkeypatch, tmp_path):
    """As when memory runs out or a C++ kernel crashes."""
    own = Path(pairs.__file__)
    fault = "import os, signal\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
    old = "        return {list(self.cases)[group]: self.runners[group]()}\n"
    for name in ("worker.py", "suite_kernels.py"):
        script = own.with_name(name).read_text()
        assert (old in script) == name.startswith("suite")
        (tmp_path / name).write_text(script.replace(old, f"        {fault}"))
    monkeypatch.setattr(pairs, "__file__", str(tmp_path / "pairs.py"))
    settings = Settings("kernels", "cpu", "float32", threads=1, filter="ada_norm · demo")
    with pytest.raises(UserError, match="its process was ended by signal 11"):
        real(settings)


def test_settings_are_sent_as_json():
    place = states.Place("x", Path("python"), Path("/state"), None)
    sent = json.loads(json.dumps(Settings("pipelines", "cpu", "float32", 1, folder="p").of(place)))
    assert sent["folder"] == "/state/p"
    assert sent["steps"] == Settings.steps
