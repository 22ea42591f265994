"""`fastdiff doctor`: each planted cause of slowness is one line that says what to do."""

import copy
import json
import logging
import os

import pytest
import torch
from command import run
from torch import nn

from fastdiff import installed
from fastdiff.bench import doctor, machine, timing
from fastdiff.runtime import recordings


@pytest.fixture
def sound(monkeypatch):
    """A machine without findings, whatever this one is like."""
    monkeypatch.setattr(doctor, "of_machine", lambda device: [])


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """packages(torch="2.9.0", …): pip sees these packages and a fastdiff-engine that requires torch
    2.11, in one extra diffusers 0.40, and in another a transformers other than 5.24.0."""
    lines = (
        "Requires-Dist: torch>=2.11",
        'Requires-Dist: triton>=3.6; extra == "gpu"',
        'Requires-Dist: diffusers>=0.40; extra == "diffusers"',
        'Requires-Dist: fastdiff-engine[diffusers]; extra == "lora"',
        'Requires-Dist: peft>=0.17; extra == "lora"',
        'Requires-Dist: transformers!=5.24.0; extra == "lora"',
        'Requires-Dist: pytest>=999; extra == "test"',
    )

    def lay(name, version, *more):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *more])
        (folder / "METADATA").write_text(text)

    def install(**versions):
        lay("fastdiff-engine", "0.1.0", *lines)
        for name, version in versions.items():
            lay(name, version)
        monkeypatch.setattr("sys.path", [str(tmp_path)])

    return install


def whats(found):
    return [one.what for one in found]


def test_the_demo_has_no_findings(sound, tmp_path):
    code, out, err = run("doctor", "--json", tmp_path / "found.json")
    assert (code, out.splitlines()[-1]) == (0, "fast: found nothing that slows demo on cpu"), err
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["schema"] == "fastdiff.doctor/1"
    assert (document["pipeline"], document["device"], document["findings"]) == ("demo", "cpu", [])


def test_bad_arguments_are_one_sentence(sound, tmp_path):
    for words, says in {
        (tmp_path / "none",): "is neither an existing folder",
        ("--device", "tpu"): "--device is 'tpu'",
        ("--height", "63"): "--height is 63",
        ("--json", tmp_path / "no" / "x.json"): "does not exist",
    }.items():
        code, out, err = run("doctor", *words)
        assert (code, out) == (2, "")
        assert says in err
        assert "Traceback" not in err


def test_parts_that_run_eagerly_are_named_with_their_reason(demo, sound, monkeypatch):
    pipe = copy.deepcopy(demo)
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    pipe.extra = nn.Linear(1, 1)
    monkeypatch.setattr("fastdiff.bench.source.opened", lambda *_: pipe)
    code, out, _ = run("doctor", "--device", "cpu")
    found = [line for line in out.splitlines() if line.startswith("slow: ")]
    assert code == 1
    assert len(found) == 3
    for line, says in zip(
        found,
        (
            "unet runs eagerly: a hook that wraps one of its modules",
            "the loop is diffusers' own: ",
            "extra runs eagerly: Linear, which fastdiff does not compute",
        ),
        strict=True,
    ):
        assert line.startswith(f"slow: {says}")
        assert line.endswith(f"; {doctor.TAKEN}")


def test_a_pipeline_that_cannot_be_compiled_is_a_finding(demo):
    pipe = copy.deepcopy(demo)
    pipe.unet.train()
    pipe.vae.train()
    (found,) = doctor.of_pipeline(pipe, 64, 64)
    assert found.what.startswith("nothing in this StableDiffusionPipeline can be made fast: unet: ")


def test_a_scheduler_without_a_plan_is_a_finding(demo):
    pipe = copy.deepcopy(demo)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    (found,) = doctor.of_pipeline(pipe, 64, 64)
    assert found.what.startswith("the loop is diffusers' own: ")


def test_a_logged_reason_for_no_cuda_graph_is_one_finding(demo, monkeypatch):
    """The report does not say why a CUDA graph could not be captured; only the log does."""
    reason = "this shape runs without a CUDA graph: aten::nonzero in unet.py"
    draw = timing.picture

    def picture(*args, **options):
        logging.getLogger("fastdiff.runtime.graphs").warning("fastdiff: %s", reason)
        draw(*args, **options)

    monkeypatch.setattr(timing, "picture", picture)
    assert whats(doctor.of_pipeline(copy.deepcopy(demo), 64, 64)) == [reason]


def test_recording_a_known_size_again_is_a_finding(demo, monkeypatch):
    made = iter(range(9))
    monkeypatch.setattr(recordings, "made", lambda: next(made))
    (found,) = doctor.of_pipeline(copy.deepcopy(demo), 64, 64)
    assert found.what == "a third picture of the same size needed a new recording (1)"


def test_unsupported_versions_are_findings(packages):
    packages(
        torch="2.9.0+cpu", diffusers="0.41.0", triton="3.5.1", peft="0.20", transformers="5.24.0"
    )
    wrong = "torch 2.9.0+cpu is installed, but fastdiff needs >=2.11"
    assert wrong in whats(doctor.of_machine("cpu"))
    assert not any("triton" in one.what for one in doctor.of_machine("cpu"))
    (old,) = [one for one in doctor.of_machine("cuda") if "triton 3.5.1" in one.what]
    assert old.do == "pip install 'triton>=3.6'"
    absent = doctor.absent()
    assert absent["gpu"] == ["triton>=3.6 (not 3.5.1)"]
    assert absent["lora"] == ["transformers!=5.24.0 (not 5.24.0)"]
    assert "diffusers" not in absent


def test_a_missing_extra_is_named_with_its_packages(packages, sound, monkeypatch):
    packages(torch="2.13.0")
    assert doctor.absent()["lora"] == ["peft>=0.17", "transformers!=5.24.0"]
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "absent", lambda: {"lora": ["peft>=0.17"]})
    monkeypatch.setattr(
        doctor, "of_machine", lambda device: [doctor.Finding("x", "y", blocks=True)]
    )
    code, out, _ = run("doctor")
    assert (code, out.splitlines()) == (
        1,
        [
            "slow: x; y",
            "not installed: peft>=0.17, for LoRA adapters; pip install 'fastdiff-engine[lora]'",
        ],
    )


def test_without_pip_metadata_importable_modules_count(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    assert installed.needs() == []
    found = doctor.of_machine("cuda")
    assert whats(found)[0].startswith(
        "no pipeline can be opened without diffusers and transformers"
    )
    assert found[0].blocks
    assert found[0].do == "pip install 'fastdiff-engine[diffusers]'"
    assert "our GPU kernels need triton, which is not installed" in whats(found)


@pytest.mark.parametrize(
    ("isa", "note", "device", "says", "blocks"),
    [
        (None, "they are not built; install a compiler", "cpu", "they are not built", False),
        (None, "they are not built; install a compiler", "cuda", None, False),
        (None, "built, but does not load: x.so", "cuda", "built, but does not load: x.so", True),
        ("avx2, threads: none: serial", None, "cpu", "no OpenMP", False),
        ("avx2, threads: torch's OpenMP", None, "cpu", None, False),
    ],
)
def test_cpp_kernels_that_do_not_run_are_findings(monkeypatch, isa, note, device, says, blocks):
    monkeypatch.setattr(doctor, "native", lambda: {"isa": isa, "note": note})
    found = list(doctor._native(device))
    assert [one.blocks for one in found] == [blocks] * (says is not None)
    assert all(says in one.what and one.do for one in found)


def test_threads_are_compared_with_the_usable_cores(tmp_path, monkeypatch):
    """Four logical CPUs on two cores; a control group may limit them to 3.5 or 1."""
    monkeypatch.setattr(doctor, "SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for one, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"devices/system/cpu/cpu{one}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    limit = tmp_path / "fs/cgroup/cpu.max"
    said = {}
    for text in ("max 100000", "350000 100000", "100000 100000"):
        limit.write_text(f"{text}\n")
        for threads in (1, 2, 4):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            said[text, threads] = " ".join(whats(doctor._threads()))
    one_of_two = "torch computes on 1 of 2 cores"
    many = "torch computes in {} threads, but only {} can run at once"
    assert said == {
        ("max 100000", 1): one_of_two,
        ("max 100000", 2): "",
        ("max 100000", 4): "",
        ("350000 100000", 1): one_of_two,
        ("350000 100000", 2): "",
        ("350000 100000", 4): "",
        ("100000 100000", 1): "",
        ("100000 100000", 2): many.format(2, 1),
        ("100000 100000", 4): many.format(4, 1),
    }


def test_a_gpu_that_torch_cannot_use_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "driver", lambda: None)
    assert list(doctor._unused_gpu()) == []
    monkeypatch.setattr(doctor, "driver", lambda: "470.82")
    monkeypatch.setattr(torch.version, "cuda", None)
    (alone,) = doctor._unused_gpu()
    assert "computes on CPUs only" in alone.what
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    old = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(doctor, "refusal", lambda device: old)
    (found,) = doctor._unused_gpu()
    assert found.what.endswith(f"with driver 470.82: {old}")
    assert found.do.startswith("update the driver")


def test_triton_without_a_c_compiler_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor, "missing", lambda extra: [])
    (found,) = doctor._triton()
    assert "C compiler" in found.what
    monkeypatch.setenv("CC", "cc")
    assert list(doctor._triton()) == []


def test_env_and_doctor_name_another_package_in_our_folder(monkeypatch):
    sentence = "fastdiff 0.3.0, another project, lies in the same folder; pip uninstall it"
    monkeypatch.setattr(installed, "clash", lambda: sentence)
    assert doctor.of_machine("cpu")[0] == doctor.Finding(*sentence.split("; "))
    assert f"- in our place: {sentence}" in run("env")[1].splitlines()
    assert machine.versions()["fastdiff"]
