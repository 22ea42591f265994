"""The exact numbers of a pipeline (launches, bytes, recordings, peak memory): they repeat, and any
planted increase shows."""

import copy

import pytest
import torch

import fastdiff
from fastdiff.bench import gates as gating
from fastdiff.bench.counters import Counts, count_pictures
from fastdiff.bench.drawn import drawn
from fastdiff.bench.gates import gates
from fastdiff.bench.memory import Baseline
from fastdiff.compiler import Options
from fastdiff.kernels.dispatch import NATIVE
from fastdiff.runtime import loop, recordings

SIDE = 32
pytestmark = [
    pytest.mark.skipif(NATIVE is None, reason="the C++ kernels were not built"),
    pytest.mark.usefixtures("young"),
]


NOTHING = Baseline(0, frozenset())


@pytest.fixture
def compiled(small_demo):
    return fastdiff.compile(copy.deepcopy(small_demo))


@pytest.fixture
def gated(small_demo, monkeypatch):
    """gated(): the numbers of `small_demo` under the patches in effect. gated(counted=False) leaves
    the launches, bytes and FLOPs at 0."""

    def numbers(counted=True):
        if not counted:
            monkeypatch.setattr(gating, "count_pictures", lambda *_: Counts({}, {}))
        return gates(lambda: copy.deepcopy(small_demo), "cpu", SIDE, SIDE)

    return numbers


@pytest.fixture(scope="module")
def healthy(small_demo):
    return gates(lambda: copy.deepcopy(small_demo), "cpu", SIDE, SIDE)


def worse(found, healthy):
    """Names of the numbers that exceed the healthy ones; peak memory may vary by 1%."""
    assert found.keys() == healthy.keys()
    return {
        name
        for name, (value, unit) in found.items()
        if value > healthy[name][0] * (1.01 if unit == "peak bytes" else 1)
    }


def test_a_size_is_recorded_once(compiled):
    """Two recordings per size (the loop's step, the decoder); a known size needs none."""
    real = drawn(compiled, SIDE, SIDE, NOTHING)
    assert (real.first, real.again, real.other_size, real.back) == (2, 0, 2, 0)
    assert real.compilations == 0


def test_eager_records_nothing_and_torch_compile_is_seen(small_demo):
    pipe = copy.deepcopy(small_demo)
    assert drawn(pipe, SIDE, SIDE, NOTHING).first == 0
    pipe.unet.time_embedding.compile(backend="eager")  # even a small graph is counted
    assert drawn(pipe, SIDE, SIDE, NOTHING).compilations >= 1


@pytest.mark.parametrize("when", ["picture", pytest.param("compile", marks=pytest.mark.product)])
def test_memory_that_stays_allocated_is_counted(gated, healthy, monkeypatch, when):
    extra, kept = 4 << 20, []
    owner, name = (loop.Plans, "__init__") if when == "compile" else (loop.Run, "advance")
    plain = getattr(owner, name)

    def hoarding(self, *args, **kwargs):
        if not kept:
            kept.append(torch.empty(extra, dtype=torch.uint8))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, hoarding)
    more, before = (found["peak memory"][0] for found in (gated(counted=False), healthy))
    assert more - before == pytest.approx(extra, abs=0.01 * before)  # its usual variation


def test_the_numbers_of_a_healthy_state_repeat(gated, healthy):
    assert worse(gated(), healthy) == set()


def test_one_more_launch_per_step_shows(gated, healthy, monkeypatch):
    advance = loop.Run.advance

    def one_more(self, noise=None):
        self._step.buffers.step.add_(0)
        advance(self, noise)

    monkeypatch.setattr(loop.Run, "advance", one_more)
    found = gated()
    assert worse(found, healthy) == {"step · launches", "step · bytes"}
    assert found["step · launches"][0] == healthy["step · launches"][0] + 1


def test_one_more_copy_of_a_tensor_shows(gated, healthy, monkeypatch):
    advance = loop.Run.advance

    def copying(self, noise=None):
        self._step.buffers.sample.clone()
        advance(self, noise)

    monkeypatch.setattr(loop.Run, "advance", copying)
    found = gated()
    assert {"step · launches", "step · bytes"} <= worse(found, healthy)
    latents = 4 * 4 * (SIDE // 2) ** 2  # float32, 4 channels
    assert found["step · bytes"][0] == healthy["step · bytes"][0] + 2 * latents


def test_recording_anew_for_every_picture_shows(gated, healthy, monkeypatch):
    """The planted key never repeats, as if shapes were compared by identity, not by value."""
    get = recordings.Kept.get
    monkeypatch.setattr(
        recordings.Kept, "get", lambda self, key, make: get(self, (key, object()), make)
    )
    names = {"same size again", "first size again"}
    found = worse(gated(counted=False), healthy)
    assert {f"recordings · {name}" for name in names} <= found


def test_work_no_longer_hoisted_is_counted_in_every_step(small_demo, healthy):
    """In diffusers' own loop each step computes the text's keys and values again."""
    pipe = fastdiff.compile(copy.deepcopy(small_demo), Options(ignore=("loop",)))
    work = count_pictures(pipe, SIDE, SIDE).step
    for name in ("launches", "bytes", "flops"):
        assert sum(getattr(kind, name) for kind in work.values()) > healthy[f"step · {name}"][0]
