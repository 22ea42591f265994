"""The tuner on a planted kernel whose candidates are known to be faster, slower or wrong."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import tune
from benchmarks.shapes import full, tiny, triton_kernels
from fastdiff.errors import UserError
from fastdiff.kernels import tuned
from fastdiff.kernels.contract import Case, KernelSpec, Launcher
from fastdiff.kernels.dispatch import Kernel
from fastdiff.kernels.inspect import planned
from fastdiff.kernels.tuned import tunable


@dataclass(frozen=True)
class LaunchConfig:
    """Milliseconds that a launch claims to take, and the factor by which it multiplies x."""

    pause: int
    factor: int


@dataclass
class Arguments:
    x: torch.Tensor


RULE = LaunchConfig(4, 1)


@dataclass(frozen=True)
class Waiting:
    """A launch without Triton or real time: it appends its milliseconds to `spent`."""

    x: torch.Tensor
    out: torch.Tensor
    config: LaunchConfig
    spent: list[int]

    def start(self):
        self.spent.append(self.config.pause)
        self.out.copy_(self.x * self.config.factor)


@pytest.fixture
def planted(monkeypatch):
    """planted(*candidates): the only kernel that the tuner sees, with these candidates."""
    module = ModuleType("planted_gpu")
    monkeypatch.setitem(sys.modules, "planted_gpu", module)
    spent: list[int] = []

    def sampler(runs, device):
        def sample():
            spent.clear()
            runs[0]()
            return float(sum(spent))

        return sample

    monkeypatch.setattr(tune, "sampler", sampler)

    @tunable("waiting")
    def pick(L, arch):
        return RULE

    def plan(arch, a):
        out = torch.empty_like(a.x)
        return (Waiting(a.x, out, pick(len(a.x), arch), spent),), out

    plan.__module__ = "planted_gpu"
    spec = KernelSpec(
        name="waiting",
        arguments=Arguments,
        formula=lambda a: a.x.clone(),
        inputs=lambda case, dtype, device, generator: {"x": torch.ones(case.L, dtype=dtype)},
        cases=(Case("demo-small", L=4), Case("demo-large", L=8)),
        bytes=lambda case, size: 2 * size * case.L,
        flops=lambda case: case.L,
    )
    launcher = Launcher(Arguments, plan)
    kernel = Kernel(spec, None, {"triton": lambda: launcher}, *[spec.reference] * 3)
    monkeypatch.setattr(tune, "triton_kernels", lambda: [kernel])

    def plant(*candidates):
        module.candidates = lambda L, arch: (RULE, *candidates)
        return kernel

    return plant


def rows_of(kernel, monkeypatch, **options):
    monkeypatch.setattr(tune, "refused", lambda *_: None)
    lines = []
    budget = tune.Budget(options.pop("minutes", 1))
    rows = tune.tune([kernel], 0, torch.device("cpu"), False, budget, lines.append)
    return rows, lines, budget


def test_a_faster_candidate_is_kept_with_its_samples(planted, monkeypatch):
    faster = LaunchConfig(1, 1)
    rows, _, _ = rows_of(planted(LaunchConfig(8, 1), faster), monkeypatch)
    assert [row["key"] for row in rows] == [{"L": 4}, {"L": 8}]
    for row in rows:
        assert row["config"] == {"pause": 1, "factor": 1}
        assert row["rule"] == {"pause": 4, "factor": 1}
        (measured,) = row["measured"]
        assert len(measured["samples_ms"]) == len(measured["rule_samples_ms"]) == tune.CONFIRM
        assert measured["ratio"]["lo"] == measured["ratio"]["median"] == 4


def test_slower_and_wrong_candidates_keep_the_rule(planted, monkeypatch):
    rows, lines, _ = rows_of(planted(LaunchConfig(8, 1), LaunchConfig(1, 2)), monkeypatch)
    assert rows == []
    assert sum("LaunchConfig(pause=1, factor=2) is wrong" in line for line in lines) == 2


def test_cases_left_out_for_time_are_named(planted, monkeypatch, capsys):
    rows, _, budget = rows_of(planted(LaunchConfig(1, 1)), monkeypatch, minutes=0)
    budget.say()
    assert rows == []
    assert capsys.readouterr().out == "0 minutes are over; left out: waiting L=4, waiting L=8\n"


def test_a_configuration_that_does_not_compile_is_refused(planted):
    kernel = planted(LaunchConfig(1, 1))
    question = next(tune.questions([kernel], 0, dry_run=False))
    assert tune.refused(question, LaunchConfig(1, 1), 90).startswith("does not compile: ")


def test_candidates_sieved_elsewhere_are_not_compiled_again(planted, monkeypatch, tmp_path):
    faster, spilling = LaunchConfig(2, 1), LaunchConfig(1, 1)
    kernel = planted(faster, spilling)
    row = SimpleNamespace(spills=0, fits=True, kernel="k", registers=1, shared=0, occupancy=1.0)
    row.limited_by, row.mma = "", ""
    bad = SimpleNamespace(**vars(row) | {"spills": 8})
    static = {faster: [row], spilling: [bad], RULE: [row]}
    monkeypatch.setattr(tune, "static_rows", lambda question, config, arch: static[config])
    path = tmp_path / "sieved.json"
    tune.write_sieved(tune.sieve([kernel], 0, lambda line: None), path)
    monkeypatch.setattr(tune, "static_rows", None)
    budget = tune.Budget(1)
    device = torch.device("cpu")
    rows = tune.tune([kernel], 0, device, False, budget, print, tune.read_sieved(path))
    assert [row["config"]["pause"] for row in rows] == [2, 2]
    path.write_text("[{}]")
    with pytest.raises(UserError, match=r"--sieved .*sieved.json cannot be used \('op'\)"):
        tune.read_sieved(path)


def test_the_table_of_a_dry_run_is_refused(planted, tmp_path, capsys):
    planted(LaunchConfig(1, 1))
    out = tmp_path / "sm_0.json"
    assert tune.main(["--dry-run", "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"1 rows: {out}\n")
    document = json.loads(out.read_text())
    assert document["dry_run"] is True
    assert document["rows"][0]["key"] == {"L": 4}
    with pytest.raises(ValueError, match="a dry run"):
        tuned.read(out, 0)
    del document["dry_run"]  # otherwise the table is valid
    out.write_text(json.dumps(document))
    assert tuned.read(out, 0) == {("waiting", "L=4"): {"pause": 1, "factor": 1}}


REFUSED = {
    ("--ops", "conv2d", "--dry-run"): "--ops names conv2d; those with candidates are waiting",
    ("--dry-run", "--out", "nowhere/x.json"): "make it first",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_arguments_are_one_sentence_and_exit_code_2(planted, arguments, capsys):
    planted()
    with pytest.raises(SystemExit) as caught:
        tune.main(list(arguments))
    assert caught.value.code == 2
    assert REFUSED[arguments] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_tuner_ends_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        tune.main([])
    assert caught.value.code == 2
    assert (
        "there is no NVIDIA GPU here; --static and --dry-run need none" in capsys.readouterr().err
    )


@pytest.mark.parametrize("kernel", triton_kernels(), ids=lambda kernel: kernel.spec.name)
def test_each_full_size_is_valid_for_its_kernel(kernel):
    assert full(kernel)
    assert len(tiny(kernel)) == 1
    for case in full(kernel):
        assert planned(kernel, case, torch.float16, 90)
