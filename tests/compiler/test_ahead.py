"""A pipeline's Triton kernels are compiled ahead of its first picture, which no failure prevents.

The pipelines are on a CPU but take it for an sm_90 GPU: they wait for the GPU's kernels, then draw
with the CPU's.
"""

import json

import pytest

import fastdiff
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.kernels.shipped import MANIFEST, SCHEMA

BEGIN = """
import logging
import shutil
import threading
import warnings
from fastdiff.compiler import ahead

def kernels(pipe):
    return next((p.why for p in fastdiff.report(pipe).parts if p.name == "kernels"), None)

class Warns(logging.Handler):
    def emit(self, record):
        warnings.warn(record.getMessage())

logging.getLogger("fastdiff").addHandler(Warns())
ahead._arch = lambda network: 90
plan = ahead.kernels_of
ahead.kernels_of = lambda runs, arch: plan(runs, arch)[:3]
pipe = fastdiff.load_demo()
"""


@pytest.fixture
def python(forked):
    """python(code, cache): the lines that `code` prints."""

    def lines(code, cache):
        status, out, err = forked(BEGIN + code, TRITON_CACHE_DIR=str(cache))
        assert status == 0, err
        return out.splitlines()

    return lines


PICTURE = """
for _ in range(2):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fastdiff.compile(pipe)
        pipe("red heart", num_inference_steps=1, output_type="latent")
    print(kernels(pipe), [str(w.message) for w in warned if "kernel" in str(w.message)], sep="|")
    fastdiff.restore(pipe)
"""


# A test below covers the same with a folder of kernels for another GPU.
@pytest.mark.product
def test_the_first_call_waits_for_all_kernels_and_the_second_compile_finds_them(python, tmp_path):
    first, second = (line.split("|") for line in python(PICTURE, tmp_path))
    assert first == ["3 kernels: 0 in Triton's cache, 3 compiled ahead", "[]"]
    assert second == ["3 kernels: 3 in Triton's cache", "[]"]


# a process that fails is a case of the same code as a plan that fails, below
@pytest.mark.product
def test_if_no_process_can_compile_the_picture_is_drawn_with_one_warning(python, tmp_path):
    code = 'sys.executable = shutil.which("false")' + PICTURE
    first, _ = (line.split("|") for line in python(code, tmp_path))
    assert "could not be compiled ahead of their first launch; _" in first[0]
    assert first[1].count("fastdiff:") == 1, "one warning"
    assert "the process that compiles ended" in first[1]


def test_if_planning_fails_the_picture_is_drawn_with_one_warning(python, tmp_path):
    code = """
def fail(runs, arch):
    raise RuntimeError("no plan")
ahead.kernels_of = fail
"""
    first, _ = (line.split("|") for line in python(code + PICTURE, tmp_path))
    sentence = "kernels are compiled only at their first launch: no plan"
    assert first == [
        f"not compiled ahead; {sentence}",
        str([f"fastdiff: {sentence}"]),
    ]


def folder(path, **changed):
    """A folder as `fastdiff warm` writes it, without a kernel."""
    facts = {"schema": SCHEMA, "of": "sd15 in fp16", "compilers": {"89": {"Triton": "3.6.0"}}}
    path.mkdir()
    (path / MANIFEST).write_text(
        json.dumps(facts | {"sources": {}, "kernels": [], "modules": []} | changed)
    )
    return path


def test_a_folder_for_another_gpu_is_named_and_the_kernels_are_compiled(python, tmp_path):
    other = folder(tmp_path / "other")
    code = PICTURE.replace("compile(pipe)", f"compile(pipe, warm={str(other)!r})")
    first, second = (line.split("|") for line in python(code, tmp_path / "cache"))
    sentence = (
        f"{other} lacks 3 kernels of this pipeline; now compiled: it has kernels for"
        " sm_89, and this GPU is sm_90"
    )
    said = f"3 kernels: 0 in Triton's cache, 0 from {other}, 3 compiled ahead"
    assert first == [f"{said}; {sentence}", str([f"fastdiff: {sentence}"])]
    assert second == ["3 kernels: 3 in Triton's cache", "[]"], "nothing is missing"


def test_on_a_cpu_the_report_says_that_the_folder_is_for_a_gpu(tmp_path):
    other = folder(tmp_path / "other")
    pipe = fastdiff.compile(fastdiff.load_demo(), warm=other)
    row = next(part for part in fastdiff.report(pipe).parts if part.name == "kernels")
    assert (row.runs, row.why) == ("Triton", f"{other} is for a GPU")
    with pytest.raises(UserError, match="Options.warm is given, but this is compiled already"):
        fastdiff.compile(pipe, warm=other)


def test_a_folder_without_kernels_is_refused_before_anything_is_compiled(tmp_path):
    pipe = fastdiff.load_demo()
    with pytest.raises(UserError, match="holds no kernels: manifest.json is missing"):
        fastdiff.compile(pipe, warm=tmp_path)
    assert slot_of(pipe.unet) is None
    assert fastdiff.report(pipe).parts[0].why == "not compiled"
    with pytest.raises(UserError, match="Options.warm is 1; give the folder that fastdiff warm"):
        fastdiff.Options(warm=1)


def test_compile_returns_before_the_kernels_are_compiled(python, tmp_path):
    code = """
go = threading.Event()
ahead.kernels_of = lambda runs, arch: go.wait() and plan(runs[:0], arch)
fastdiff.compile(pipe)
print(kernels(pipe))
go.set()
pipe("red heart", num_inference_steps=1, output_type="latent")
print(kernels(pipe))
"""
    assert python(code, tmp_path) == ["being planned", "0 kernels: 0 in Triton's cache"]
