"""How the implementation of an op on a CPU is chosen: by the nearest row of a measured table. Also
how the table is read and how it is measured."""

import json
from dataclasses import replace

import pytest
import torch

import fastdiff
from benchmarks import tune_cpu
from benchmarks.cpu_calls import calls
from fastdiff.demo import load_demo
from fastdiff.kernels import choices
from fastdiff.kernels.choices import LIBRARY, OWN, Row, Work
from fastdiff.kernels.conv2d import conv2d, cpu
from fastdiff.kernels.dispatch import NATIVE, implementation
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import counting
from fastdiff.runtime import tape

pytestmark = pytest.mark.skipif(NATIVE is None, reason="needs the C++ kernels")
CONV = "3x3 stride 1 padding 1 1"


@pytest.fixture
def rows(monkeypatch):
    """rows(Row, …): use these rows as the table of every instruction set."""

    def given(*rows: Row) -> None:
        alike: dict[tuple[str, str, str, int], tuple[Row, ...]] = {}
        for row in rows:
            key = (row.work.op, row.work.dtype, row.work.kind, len(row.work.sizes))
            alike[key] = (*alike.get(key, ()), row)
        monkeypatch.setattr(choices, "table", lambda isa: alike)
        choices._chosen.cache_clear()
        choices._decided.cache_clear()

    monkeypatch.setattr(choices, "has_amx", lambda: False)
    yield given
    monkeypatch.undo()
    choices._chosen.cache_clear()
    choices._decided.cache_clear()


def row(op: str, kind: str, sizes: tuple[int, ...], runs: str) -> Row:
    return Row(Work(op, "float32", kind, sizes), runs, {runs: 1.0})


def lent(rows: int, columns: int) -> torch.Tensor:
    """A weight as `models.borrow` lays it out."""
    return torch.randn(rows, columns).t()


def called(run) -> list[str]:
    """Our C++ kernels that `run` calls."""
    with counting() as names:
        run()
    return list(names)


def test_the_nearest_size_decides(rows):
    rows(
        row("linear", "none", (4096, 320, 320), LIBRARY),
        row("linear", "none", (64, 320, 320), OWN),
    )
    weight = lent(320, 320)
    assert called(lambda: linear(torch.randn(4096, 320), weight)) == []
    assert called(lambda: linear(torch.randn(3000, 320), weight)) == []
    assert called(lambda: linear(torch.randn(100, 320), weight)) == ["conv"]
    assert called(lambda: linear(torch.randn(4096, 320), weight, act="silu")) == ["conv"]
    assert called(lambda: linear(torch.randn(4096, 320).bfloat16(), weight.bfloat16())) == ["conv"]


def test_impl_cpu_is_our_kernel_even_where_the_table_says_library(rows):
    rows(row("linear", "none", (8, 4, 4), LIBRARY))
    x, weight = torch.randn(8, 4), lent(4, 4)
    assert called(lambda: implementation("linear", "cpu")(x, weight)) == ["conv"]
    torch.testing.assert_close(linear(x, weight), x @ weight.t())


def test_the_librarys_convolution_is_also_enlarged_and_added_to(rows):
    x, residual = torch.randn(2, 5, 5, 8), torch.randn(2, 10, 10, 16)
    weight = torch.randn(3, 3, 8, 16).permute(3, 2, 0, 1)
    ours = conv2d(x, weight, torch.ones(16), size=(10, 10), residual=residual)
    rows(row("conv2d", CONV + " enlarged", (2, 10, 10, 8, 16), LIBRARY))
    theirs = conv2d(x, weight, torch.ones(16), size=(10, 10), residual=residual)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_an_unmeasured_instruction_set_runs_our_fastest_measured_kernel(tmp_path, monkeypatch):
    work = {"op": "conv2d", "kind": CONV, "sizes": [1, 8, 8, 8, 16], "runs": LIBRARY}
    rows = [
        work | {"dtype": "float32", "ms": {"direct": 3, "winograd24": 2, LIBRARY: 1}},
        work | {"dtype": "bfloat16", "ms": {"direct": 2, "winograd24": 3, LIBRARY: 1}},
    ]
    about = dict.fromkeys(choices.ABOUT, "") | {"schema": choices.SCHEMA, "isa": choices.MEASURED}
    path = tmp_path / f"cpu_{choices.MEASURED}.json"
    path.write_text(json.dumps(about | {"rows": rows}))
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    choices.table.cache_clear()
    for isa, runs in ((choices.MEASURED, LIBRARY), ("avx2", "winograd24")):
        table = choices.table(isa)
        assert {row.runs for rows in table.values() for row in rows} == {runs}
        assert {dtype for _, dtype, *_ in table} == {"float32", "bfloat16"}
    choices.table.cache_clear()


def test_three_channels_do_not_run_the_coarsest_algorithm(rows, monkeypatch):
    rows(row("conv2d", CONV, (1, 8, 8, 8, 16), "winograd24"))
    asked = []
    monkeypatch.setattr(cpu, "convolved", lambda a, algorithm: asked.append(algorithm))
    for channels in (3, 4):
        weight = torch.randn(3, 3, channels, 16).permute(3, 2, 0, 1)
        cpu.run(cpu.Arguments(torch.randn(1, 8, 8, channels), weight, None, 1, [1, 1]))
    assert asked == [cpu.ALGORITHMS["winograd22"], cpu.ALGORITHMS["winograd24"]]


def test_no_tape_is_recorded_of_what_the_library_computes(rows):
    x, weight = torch.randn(8, 4), lent(4, 4)
    assert tape.record(lambda x: linear(x, weight), (x,)) is not None
    rows(row("linear", "none", (8, 4, 4), LIBRARY))
    assert tape.record(lambda x: linear(x, weight), (x,)) is None


def test_the_library_computes_bfloat16_where_there_is_amx(rows, monkeypatch):
    rows()
    monkeypatch.setattr(choices, "has_amx", lambda: True)
    x, weight = torch.randn(8, 4), lent(4, 4)
    assert called(lambda: linear(x, weight)) == ["conv"]
    assert called(lambda: linear(x.bfloat16(), weight.bfloat16())) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "fastdiff.cpu/0"}, "has schema 'fastdiff.cpu/0'"),
        ({"isa": "avx2"}, "for avx2, not for avx512"),
        ({"rows": [{"op": "linear"}]}, "it has no 'sizes'"),
        ({"rows": [{"sizes": [0]}]}, "positive integers"),
        ({"rows": [{"op": "linear", "dtype": "float32", "kind": "", "sizes": [1],
                    "runs": "own", "ms": {"library": 1}}]}, "was not measured"),
    ],
)  # fmt: skip
def test_an_invalid_table_is_refused_with_the_reason(tmp_path, change, says):
    path = tmp_path / "cpu_avx512.json"
    about = dict.fromkeys(choices.ABOUT, "") | {"isa": "avx512"}
    path.write_text(json.dumps({"schema": choices.SCHEMA, **about, "rows": []} | change))
    with pytest.raises(ValueError, match=says):
        choices.read(path, "avx512")


def test_every_call_of_a_real_picture_is_measured(monkeypatch):
    real = set()
    answer = choices.runs

    def noted(spec, a, isa):
        real.add(choices.work_of(spec, a))
        return answer(spec, a, isa)

    monkeypatch.setattr(choices, "runs", noted)
    pipe = load_demo()
    fastdiff.compile(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe("red heart", num_inference_steps=1, output_type="pt")
    measured = {call.work for call in calls(torch.float32, ["demo"])}
    assert len(real) > 50
    assert sorted(map(str, real - measured)) == []


def test_tuning_measures_every_implementation():
    (call,) = [
        call
        for call in calls(torch.float32, ["demo"])
        if call.work.op == "linear" and call.work.sizes == (1, 256, 256)
    ]
    measured = tune_cpu.measured(call)
    assert set(measured["ms"]) == {OWN, LIBRARY, "eager"}
    assert call.taped


@pytest.mark.parametrize(
    ("times", "taped", "runs"),
    [
        ({OWN: 9.0, LIBRARY: 8.0}, True, LIBRARY),
        ({OWN: 8.2, LIBRARY: 8.0}, False, OWN),
        ({OWN: 0.4, LIBRARY: 0.1}, True, OWN),  # staying on the tape is worth more
        ({OWN: 0.4, LIBRARY: 0.1}, False, LIBRARY),
        ({OWN: 0.008, LIBRARY: 0.004}, False, OWN),  # the difference is noise
        ({"direct": 3.0, "winograd24": 2.0, LIBRARY: 2.1}, False, "winograd24"),
    ],
)
def test_the_fastest_of_ours_runs_unless_the_library_is_clearly_faster(times, taped, runs):
    own = [name for name in times if name != LIBRARY]
    assert tune_cpu.choose(times, own, taped) == runs


@pytest.mark.parametrize("path", sorted(choices.FOLDER.glob("cpu_*.json")), ids=lambda x: x.stem)
def test_no_kernel_of_ours_runs_where_torchs_was_measured_to_be_faster(path):
    rows = choices.read(path, path.stem.removeprefix("cpu_"))
    assert len(rows) > 100
    assert [row for row in rows if tune_cpu.slower(row)] == []
    (row,) = [row for row in rows if row.runs == OWN][:1]
    assert tune_cpu.slower(replace(row, ms={OWN: 1.06, LIBRARY: 1.0, "eager": 1.2}))
    assert not tune_cpu.slower(replace(row, ms={OWN: 1.06, LIBRARY: 1.02, "eager": 1.2}))
    assert not tune_cpu.slower(replace(row, ms={OWN: 0.008, LIBRARY: 0.004}))
