"""Kernels that `fastdiff warm` compiled are found by Triton's own launcher, or named as missing.

The tests' own process runs kernels in Triton's interpreter, so separate processes compile and start
them.
"""

import json
import shutil
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.kernels.shipped import MANIFEST, read

HERE = Path(__file__).parent
ARCH = 90

BEGIN = f"""
import functools, sys, torch
sys.path.insert(0, {str(HERE)!r})
from stub import Stub
from pathlib import Path
from fastdiff.bench.blueprints import named
from fastdiff.bench.source import Source
from fastdiff.cli import main
from fastdiff.compiler.parts import parts
from fastdiff.families import Sizes
from fastdiff.kernels import shipped
from fastdiff.kernels.jobs import job_of, kernel_of
from fastdiff.models import Loan
from fastdiff.runtime.planned import kernels_of

@functools.cache
def launches(pipeline, arch={ARCH}):
    "The launches of a picture of a folder or a preset, planned directly instead of from jobs."
    source = Source(pipeline) if Path(pipeline).is_dir() else Source(preset=pipeline)
    plan, runs = named(source, "warm"), []
    for module, kind in (parts(plan.denoiser) | parts(plan.vae)).values():
        cast = torch.nn.Module.to(module, dtype=torch.float16)
        network = kind.borrow(cast, Loan(cast, rehearsal=True))
        for upcast in plan.upcasts:
            runs += kind.planned(network, Sizes(plan.side, plan.factor, upcast=upcast))
    return kernels_of(runs, arch)
"""


@pytest.fixture(scope="module")
def python(compiling):
    """python(code, cache, *arguments): what a process prints whose Triton cache is `cache`."""
    return lambda code, cache, *arguments: compiling(
        BEGIN + code, *arguments, TRITON_CACHE_DIR=str(cache)
    )


@pytest.fixture(scope="module")
def warm(python, tmp_path_factory):
    """warm(*pipeline): the folder that `fastdiff warm` writes."""

    def written(*pipeline):
        place = tmp_path_factory.mktemp("warm")
        words = ["warm", *pipeline, "--out", place / "out", "--arch", ARCH]
        python("main(sys.argv[1:])", place / "cache", *words)
        return place / "out"

    return written


START = """
shipped_folder, pipeline, arch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
shipped.install(shipped.read(shipped_folder), arch)
stub = Stub(arch)
asked = launches(pipeline, arch)
for launch in asked:
    launch.start()
assert len(stub.started) == len(asked) > 0, stub.started
print(len(asked), *stub.compiled)
"""


# 20 s, so the tests that read it belong to `make test-all`
@pytest.fixture(scope="module")
def small_kernels(warm, small_folder):
    return warm(small_folder)


# the small pipeline has kernels of every kind; larger ones only have more sizes
@pytest.mark.product
@pytest.mark.parametrize("preset", [None, "sdxl"])
def test_a_fresh_process_compiles_none_of_a_pipelines_kernels(
    preset, tmp_path, python, warm, small_folder, small_kernels
):
    """Triton's own launcher starts every planned launch, on a driver that starts nothing."""
    folder = warm("--preset", preset) if preset else small_kernels
    asked = (folder, preset or small_folder, ARCH)
    count, *compiled = python(START, tmp_path / "cache", *asked).split()
    assert int(count) > 10
    assert compiled == []


DIFFERENCES = """
from fastdiff.kernels import cached
shipped_folder, pipeline, arch, more = sys.argv[1:]
arch = int(arch)
if more:
    kernel = kernel_of(job_of(launches(pipeline)[0], 90))
    kernel._unsafe_update_src(kernel.src + "\\n    # " + more)
folder = shipped.read(Path(shipped_folder))
jobs = [job_of(launch, arch) for launch in launches(pipeline, arch)]
shipped.install(folder, arch)
print("; ".join(shipped.differences(folder, jobs, arch)), sum(map(cached.holds, jobs)), len(jobs))
"""


def changed(folder, tmp_path, **entries):
    """A copy of a shipped folder, entries of its manifest changed."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = copy / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | entries))
    return copy


@pytest.mark.product
def test_differences_are_named_and_only_equal_kernels_are_found(
    python, small_folder, small_kernels, tmp_path
):
    printed = python(DIFFERENCES, tmp_path / "same", small_kernels, small_folder, ARCH, "")
    *said, held, asked = printed.split()
    assert (said, held) == ([], asked)

    there = (small_kernels, small_folder, ARCH)
    printed = python(DIFFERENCES, tmp_path / "source", *there, "another line")
    *said, held, asked = printed.split()
    assert " ".join(said).startswith("the source of _")
    assert " ".join(said).endswith("_kernel differs")
    assert 0 < int(held) < int(asked)

    printed = python(DIFFERENCES, tmp_path / "arch", small_kernels, small_folder, 89, "")
    assert printed.startswith("it has kernels for sm_90, and this GPU is sm_89 0 ")


@pytest.mark.product
def test_another_version_of_triton_is_named(python, small_folder, small_kernels, tmp_path):
    compilers = json.loads((small_kernels / MANIFEST).read_text())["compilers"]
    here = compilers["90"]["Triton"]
    copy = changed(small_kernels, tmp_path, compilers={"90": compilers["90"] | {"Triton": "3.4.0"}})
    printed = python(DIFFERENCES, tmp_path / "cache", copy, small_folder, ARCH, "")
    assert printed.startswith(f"Triton is 3.4.0 there and {here} here ")


@pytest.mark.product
def test_two_processes_install_at_once_into_a_filled_cache(
    python, small_folder, small_kernels, tmp_path
):
    """A file that is there already stays."""
    code = """
import os
child = os.fork()
for _ in range(2):
    shipped.install(shipped.read(Path(sys.argv[1])), 90)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    python(code, tmp_path, small_kernels)
    there = (small_kernels, small_folder, ARCH)
    *said, held, asked = python(DIFFERENCES, tmp_path, *there, "").split()
    assert (said, held) == ([], asked)
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".fastdiff")]
    assert left == []


@pytest.mark.product
def test_a_cache_that_cannot_be_written_is_an_error(python, small_kernels, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    code = """
try:
    shipped.install(shipped.read(Path(sys.argv[1])), 90)
except shipped.UserError as error:
    print(error)
"""
    printed = python(code, tmp_path / "cache", small_kernels)
    assert "cannot be made: Not a directory" in printed


@pytest.mark.product
@pytest.mark.parametrize("suffix", [".cubin", ".json"])
def test_a_damaged_file_is_refused(suffix, small_kernels, tmp_path):
    copy = changed(small_kernels, tmp_path)
    file = next(
        path for path in sorted(copy.iterdir()) if path.suffix == suffix and path.stem[0] == "s"
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=f"{file.name} is damaged: its hash differs from the manifest's"
    ):
        read(copy)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} cannot be read: No such file"):
        read(copy)


@pytest.mark.product
def test_a_manifest_that_names_a_file_outside_or_is_damaged_is_refused(small_kernels, tmp_path):
    kernels = json.loads((small_kernels / MANIFEST).read_text())["kernels"]
    outside = kernels[0] | {"cubin": {"file": "../cubin", "sha256": ""}}
    copy = changed(small_kernels, tmp_path, kernels=[outside])
    with pytest.raises(UserError, match=r"is damaged \(ValueError: the file '../cubin'\)"):
        read(copy)
    (copy / MANIFEST).write_text(json.dumps({"schema": "fastdiff.warm/0"}))
    with pytest.raises(UserError, match="has schema 'fastdiff.warm/0', but this fastdiff reads"):
        read(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        read(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds no kernels: manifest.json is missing"):
        read(copy)


HASHED = """
from fastdiff.kernels.dispatch import all_kernels, module_of
for name, kernel in all_kernels().items():
    if "triton" not in kernel.implementations:
        continue
    functions = vars(module_of(f"fastdiff.kernels.{name}.gpu"))
    for function in [value for value in functions.values() if hasattr(value, "cache_key")]:
        first, function.hash = function.cache_key, None
        assert function.cache_key == first, function
        print(function)
"""


def test_a_kernels_hash_does_not_depend_on_what_was_hashed_before(python, tmp_path):
    """Triton up to 3.7 includes the constants of a called function only after hashing that one."""
    assert len(python(HASHED, tmp_path).splitlines()) > 10


FAILING = """
from dataclasses import replace
from fastdiff.kernels.pool import compile_jobs
jobs = [job_of(launch, 90) for launch in launches(sys.argv[1])][:3]
jobs[1] = replace(jobs[1], num_warps=3)
for answer in sorted(compile_jobs(jobs), key=lambda answer: answer.at):
    print(answer.at, answer.key is not None, answer.error)
"""


def test_a_job_that_fails_does_not_stop_the_others(python, small_folder, tmp_path):
    first, second, third = python(FAILING, tmp_path, small_folder).splitlines()
    assert (first, third) == ("0 True None", "2 True None")
    assert second == "1 False AssertionError: num_warps must be a power of 2"


def test_the_jobs_of_a_compiling_process_that_ends_get_an_error(monkeypatch):
    from fastdiff.kernels import pool
    from fastdiff.kernels.jobs import Job

    monkeypatch.setattr(pool.sys, "executable", "/bin/false")
    job = Job(90, "module", "kernel", {}, (), {}, 4, 1)
    (answer,) = pool.compile_jobs([job])
    assert (answer.key, answer.error) == (None, "the process that compiles ended")
