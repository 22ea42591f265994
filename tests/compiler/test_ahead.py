"""What a pipeline asks of a GPU is compiled before its first picture, which nothing here can spoil.

The pipelines lie on a CPU, and are told that they lie on a GPU of sm_90: what they draw is drawn by
the CPU's kernels, but only once those of the GPU are there.
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

class Told(logging.Handler):
    def emit(self, record):
        warnings.warn(record.getMessage())

logging.getLogger("fastdiff").addHandler(Told())
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


# the same with a folder that has none of them is below
@pytest.mark.product
def test_the_first_call_waits_for_all_kernels_and_the_next_process_finds_them(python, tmp_path):
    first, second = (line.split("|") for line in python(PICTURE, tmp_path))
    assert first == ["3 kernels: 0 in Triton's cache, 3 compiled ahead", "[]"]
    assert second == ["3 kernels: 3 in Triton's cache", "[]"]


def test_where_no_process_can_compile_the_picture_is_drawn_and_a_sentence_says_why(
    python, tmp_path
):
    code = 'sys.executable = shutil.which("false")' + PICTURE
    first, _ = (line.split("|") for line in python(code, tmp_path))
    assert "could not be compiled ahead of their first launch; _" in first[0]
    assert first[1].count("fastdiff:") == 1, "one warning"
    assert "the process that compiles ended" in first[1]


def test_where_planning_fails_the_picture_is_drawn_and_a_sentence_says_why(python, tmp_path):
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
    """A folder of `fastdiff warm` without a kernel."""
    told = {"schema": SCHEMA, "of": "sd15 in fp16", "compilers": {"89": {"Triton": "3.6.0"}}}
    path.mkdir()
    (path / MANIFEST).write_text(
        json.dumps(told | {"sources": {}, "kernels": [], "modules": []} | changed)
    )
    return path


def test_a_folder_for_something_else_is_named_and_the_kernels_are_compiled(python, tmp_path):
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


def test_on_a_cpu_a_folder_waits_for_a_gpu(tmp_path):
    other = folder(tmp_path / "other")
    pipe = fastdiff.compile(fastdiff.load_demo(), warm=other)
    row = next(part for part in fastdiff.report(pipe).parts if part.name == "kernels")
    assert (row.runs, row.why) == ("Triton", f"{other} is for a GPU")
    with pytest.raises(UserError, match="Options.warm comes too late"):
        fastdiff.compile(pipe, warm=other)


def test_what_is_no_folder_of_kernels_is_refused_before_anything_is_taken(tmp_path):
    pipe = fastdiff.load_demo()
    with pytest.raises(UserError, match="holds no kernels: manifest.json is missing"):
        fastdiff.compile(pipe, warm=tmp_path)
    assert slot_of(pipe.unet) is None
    assert fastdiff.report(pipe).parts[0].why == "not compiled"
    with pytest.raises(UserError, match="Options.warm is 1; give the folder that fastdiff warm"):
        fastdiff.Options(warm=1)


def test_compile_returns_before_the_kernels_are_there(python, tmp_path):
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
