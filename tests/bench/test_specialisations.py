"""How many compiled kernels a pipeline needs, as Triton counts them; CI fails above a limit."""

import json
from functools import cache

import pytest
import torch
from command import run
from covered import covered

from fastdiff.bench import specialisations
from fastdiff.bench.specialisations import MOST, PIPELINES
from fastdiff.kernels.occupancy import SMS

HASHED = """
import torch
from fastdiff.bench.specialisations import needed
from fastdiff.kernels.inspect import _source
found = needed("sd15", 90, torch.float16)
hashes = {(_source(one).hash(), one.num_warps, one.num_stages) for one in found}
print(len(found), len(hashes))
"""


counted = cache(specialisations.counted)


@pytest.fixture(autouse=True)
def _counted_once(monkeypatch):
    monkeypatch.setattr(specialisations, "counted", counted)


@pytest.mark.parametrize(("pipeline", "arch"), covered(PIPELINES, SMS, together=1))
def test_a_pipeline_needs_few_kernels(pipeline, arch):
    """It once took 76 for SD1.5 (45 of them for GroupNorm) and 55 for SDXL."""
    kernels = counted(pipeline, arch, torch.float16)
    assert sum(kernels.values()) <= MOST == 30
    norms = ("_one_pass_kernel", "_twice_kernel", "_statistics_kernel", "_apply_kernel")
    assert sum(kernels.get(name, 0) for name in norms) <= 12
    assert {"_apply_kernel", "_ada_norm_kernel", "_guided_step_kernel"} <= set(kernels)


# compiles; CI runs `fastdiff inspect --count`
@pytest.mark.product
def test_each_counted_kernel_is_a_different_source_for_triton(compiling):
    found, hashes = compiling(HASHED).split()
    assert found == hashes


def test_the_command_counts(tmp_path):
    file = tmp_path / "counts.json"
    code, out, _ = run("inspect", "--count", "--arch", "90", "--json", file)
    assert code == 0
    counts = json.loads(file.read_text())["90"]
    assert list(counts) == list(PIPELINES)
    assert counts["sd15"] == counted("sd15", 90, torch.float16)
    assert "_apply_kernel · sm_90" in out


def test_too_many_kernels_are_one_sentence_and_exit_code_1(monkeypatch):
    monkeypatch.setattr(specialisations, "MOST", 20)
    code, _, err = run("inspect", "--count", "--arch", "90")
    assert code == 1
    assert "sd15 needs 29 kernels on sm_90, more than 20" in err
    assert "sdxl" not in err


@pytest.mark.parametrize("more", [["attention"], ["--models"]])
def test_count_takes_neither_a_kernel_nor_models(more):
    code, _, err = run("inspect", "--count", *more)
    assert code == 2
    assert "--count takes neither a kernel" in err
    code, _, err = run("inspect", "--count", "--arch", "75")
    assert code == 2
    assert "--arch is 75" in err
