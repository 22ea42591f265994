"""Engines that TensorRT-RTX really builds: what their manifests say, and how damage is reported."""

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tensorrt_rtx
import torch
from command import run, run_json
from diffusers import UNet2DConditionModel
from disks import small_disk
from small import ONE_LEVEL, noisy

from fastdiff.bench.progress import phases, status
from fastdiff.engines import trt
from fastdiff.errors import UserError
from fastdiff.export import onnx as exporter
from fastdiff.export import shapes
from fastdiff.export import trt as builder
from fastdiff.export.parts import parts
from fastdiff.families import family, settings

TARGETS = ("sm_89", "sm_120")
PROFILES = {  # for 32 pixels, 2 per latent, and a text of 24 tokens; guidance doubles the batch
    "text_encoder": {"input_ids": ([1, 24], [2, 24], [4, 24])},
    "unet": {
        "sample": ([1, 4, 8, 8], [2, 4, 16, 16], [4, 4, 24, 24]),
        "encoder_hidden_states": ([1, 24, 128], [2, 24, 128], [4, 24, 128]),
    },
    "vae_decoder": {"latent_sample": ([1, 4, 8, 8], [1, 4, 16, 16], [2, 4, 24, 24])},
    "vae_encoder": {"sample": ([1, 3, 16, 16], [1, 3, 32, 32], [2, 3, 48, 48])},
}
ENDS = ("min", "opt", "max")
SILENT = SimpleNamespace(**dict.fromkeys(("start", "step", "finish"), lambda *_: None))


def refused(*arguments):
    """The sentence of a command that exits 2."""
    code, out, err = run(*arguments)
    sentence = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert sentence.startswith("fastdiff: ")
    return sentence


def ends(profile):
    """A profile of a manifest in the form of PROFILES."""
    return {name: tuple(shape[end] for end in ENDS) for name, shape in profile.items()}


def int64s(shape):
    """A shape as a plan holds it."""
    return struct.pack(f"<{len(shape)}q", *shape)


@pytest.fixture(scope="session")
def half(small_demo):
    """`small_demo` with the smallest U-Net."""
    pipe = copy.deepcopy(small_demo)
    config = ONE_LEVEL | {"sample_size": 16, "cross_attention_dim": 128}
    pipe.unet = noisy(UNet2DConditionModel(**config))
    return pipe.to(torch.float16)


@pytest.fixture(scope="session")
def half_folder(half, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "pipe"
    half.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def networks(half):
    return parts(half, torch.float16)


whole = pytest.mark.product
"""For tests that read `built`, whose exports and engines take half a minute; the others build the
engine of one part."""


@pytest.fixture(scope="session")
def built(half_folder, tmp_path_factory):
    """The folder that the command line writes, and its JSON."""
    out = tmp_path_factory.mktemp("trt") / "out"
    targets = ",".join(TARGETS)
    code, printed, _ = run_json("export", half_folder, "--trt", "--out", out, "--target", targets)
    assert code == 0
    return SimpleNamespace(out=out, document=printed)


@pytest.fixture(scope="session")
def encoder(networks, tmp_path_factory):
    """The VAE encoder, and a folder with its ONNX file."""
    folder = tmp_path_factory.mktemp("encoder")
    exporter.write(networks[-1], folder, exporter.TRT_OPSET, lambda line: None)
    return SimpleNamespace(part=networks[-1], folder=folder)


def order(part, target="sm_89", **more):
    """An order for one shape of one part."""
    asked = shapes.parse(None, "1x32x32")
    return trt.Order(target, shapes.profiles((part,), asked)[part.folder], **more)


@whole
def test_every_part_and_target_has_a_plan_and_a_manifest(built):
    files = {str(path.relative_to(built.out)) for path in built.out.rglob("*") if path.is_file()}
    engines = {
        f"{target}/{part}/{file}"
        for target in TARGETS
        for part in PROFILES
        for file in ("model.plan", "engine.json")
    }
    assert engines <= files
    assert {f"{part}/config.json" for part in PROFILES} <= files
    assert {"model_index.json", "scheduler/scheduler_config.json"} <= files
    assert not [file for file in files if "onnx" in file]
    assert [path.name for path in built.out.parent.iterdir()] == ["out"]


@whole
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("part", PROFILES)
def test_a_manifest_says_what_the_plan_is(built, networks, part, target):
    place = built.out / target / part
    document = json.loads((place / "engine.json").read_text())
    plan = (place / "model.plan").read_bytes()
    network = next(network for network in networks if network.folder == part)
    expected = {
        "schema": "fastdiff.engine/1",
        "part": part,
        "flavor": "rtx",
        "version": tensorrt_rtx.__version__,
        "target": target,
        "compatible": [],
        "dtype": "float16",
        "opset": 22,
        "plan_bytes": len(plan),
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "config_sha256": hashlib.sha256(
            (built.out / part / "config.json").read_bytes()
        ).hexdigest(),
        "numeric_check": None,
    }
    assert {key: document[key] for key in expected} == expected
    assert document["numeric_check_reason"].startswith("not run")
    assert document["network_sha256"] == network_sha256(network.source)
    assert [ends(profile) for profile in document["profiles"]] == [PROFILES[part]]
    # The plan itself names its GPU and tensors, and holds the shapes that it takes.
    assert plan.count(b"accelerators={" + target.replace("_", "").encode() + b" }") == 1
    for name in (*document["inputs"], *document["outputs"]):
        assert name.encode() in plan
    for bounds in PROFILES[part].values():
        for shape in bounds:
            if len(shape) > 2:  # two numbers could occur by chance
                assert int64s(shape) in plan
                assert int64s([*shape[:-1], shape[-1] + 1]) not in plan


def network_sha256(module):
    """As documented: name, dtype and shape of each tensor, then its bytes, sorted by name; then the
    settings."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    for setting in settings(module):
        digest.update(f"{setting}\n".encode())
    return digest.hexdigest()


@whole
def test_the_onnx_hash_is_that_of_the_file_that_was_built(built, encoder):
    """Exporting again gives the same file."""
    content = (encoder.folder / "vae_encoder/model.onnx").read_bytes()
    document = json.loads((built.out / "sm_89/vae_encoder/engine.json").read_text())
    assert document["onnx_sha256"] == hashlib.sha256(content).hexdigest()


@whole
def test_the_command_prints_its_manifests(built):
    rows = built.document["engines"]
    assert [(row["part"], row["target"]) for row in rows] == [
        (part, target) for part in PROFILES for target in TARGETS
    ]
    for row in rows:
        file = built.out / row["target"] / row["part"] / "engine.json"
        assert json.loads(file.read_text()) == row


@whole
def test_dry_run_reports_the_same_and_writes_nothing(built, half_folder, tmp_path):
    out = ("--trt", "--out", tmp_path / "out")
    code, printed, _ = run_json(
        "export", half_folder, *out, "--target", ",".join(TARGETS), "--dry-run"
    )
    assert code == 0
    rows = printed["engines"]
    assert len(rows) == len(built.document["engines"])
    for row, made in zip(rows, built.document["engines"], strict=True):
        assert row == {key: made[key] for key in row}
    assert list(tmp_path.iterdir()) == []


@whole
def test_inspect_shows_whole_engines(built):
    code, out, _ = run("inspect", built.out)
    assert code == 0
    assert f"sm_120/unet: rtx {tensorrt_rtx.__version__} for sm_120, float16" in out
    code, printed, _ = run_json("inspect", built.out / "sm_89/unet")
    assert code == 0
    assert list(printed.values()) == [
        json.loads((built.out / "sm_89/unet/engine.json").read_text())
    ]


def edit(**values):
    def change(place):
        file = place / "engine.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def truncate(place):
    os.truncate(place / "model.plan", (place / "model.plan").stat().st_size // 2)


def flip(place):
    with (place / "model.plan").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))


DAMAGE = {
    "truncated": (truncate, "bytes were"),
    "flipped byte": (flip, "has SHA-256"),
    "no plan": (lambda place: (place / "model.plan").unlink(), "model.plan cannot be read"),
    "no manifest": (lambda place: (place / "engine.json").unlink(), "engine.json is missing"),
    "no JSON": (lambda place: (place / "engine.json").write_text("{"), "is not readable JSON"),
    "schema": (edit(schema="fastdiff.engine/2"), "has schema 'fastdiff.engine/2'"),
    "version": (
        edit(version="1.0.0"),
        f"was built by rtx 1.0.0, but {tensorrt_rtx.__version__} is installed",
    ),
    "flavor": (edit(flavor="other"), "was built by other; expected tensorrt or rtx"),
    "foreign": (edit(flavor="tensorrt"), "tensorrt needs tensorrt"),
}


@whole
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_of_one_sentence(built, tmp_path, monkeypatch, damage):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    place = tmp_path / "sm_89/text_encoder"
    shutil.copytree(built.out / "sm_89/text_encoder", place)
    change, message = DAMAGE[damage]
    change(place)
    assert message.replace("bytes were", "bytes, but") in refused("inspect", tmp_path)


@whole
def test_loading_needs_a_gpu(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"unet needs an NVIDIA GPU \(sm_89\), and there is none"):
        trt.load(built.out / "sm_89/unet", torch.device("cuda"))


@whole
def test_a_bench_of_engines_without_a_gpu_says_why_it_cannot_run(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    short = ("--steps", "1", "--rounds", "2", "--engines", built.out)
    code, out, err = run("bench", "--backends", "eager,tensorrt", *short)
    assert (code, out) == (2, "")
    why = "--backends tensorrt cannot run here: .*/unet needs an NVIDIA GPU .*, and there is none"
    assert re.search(why, err.splitlines()[-1])


@whole
def test_loading_needs_the_gpu_it_was_built_for(built, monkeypatch):
    monkeypatch.setattr(trt, "here", lambda device: "sm_75")
    with pytest.raises(
        UserError, match="was built for sm_89, but this GPU is sm_75; .* --target sm_75"
    ):
        trt.load(built.out / "sm_89/unet", torch.device("cuda"))


def test_static_and_given_shapes(networks):
    one = shapes.profiles(networks, shapes.parse(None, "2x64x32"))
    assert {part: ends(profile) for part, profile in one.items()} == {
        "text_encoder": {"input_ids": ([2, 24], [4, 24], [4, 24])},
        "unet": {
            "sample": ([4, 4, 32, 16],) * 3,
            "encoder_hidden_states": ([4, 24, 128],) * 3,
        },
        "vae_decoder": {"latent_sample": ([2, 4, 32, 16],) * 3},
        "vae_encoder": {"sample": ([2, 3, 64, 32],) * 3},
    }
    many = shapes.profiles(networks, shapes.parse("1x16x32:3x48x32:5x48x64", None))
    assert ends(many["unet"])["sample"] == ([1, 4, 8, 16], [6, 4, 24, 16], [10, 4, 24, 32])
    assert ends(many["vae_decoder"])["latent_sample"] == (
        *([1, 4, 8, 16], [3, 4, 24, 16]),
        [5, 4, 24, 32],
    )


# 12 s; test_onnx.py exports the same inputs in float32, and the rest is as for the U-Net above.
@pytest.mark.product
def test_the_inputs_of_sdxl_in_half(tmp_path):
    """Its time_ids go through sines and are then concatenated with the text in half precision."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    part = family("unet").denoised.part("unet", unet.eval().half(), torch.float16)
    exporter.write(part, tmp_path, exporter.TRT_OPSET, lambda line: None)
    asked = order(part, "sm_120")
    assert ends(asked.profile) == {
        "sample": ([2, 4, 32, 32],) * 3,
        "encoder_hidden_states": ([2, 77, 32],) * 3,
        "text_embeds": ([2, 32],) * 3,
        "time_ids": ([2, 6],) * 3,
    }
    plan = bytes(trt.build("rtx", tmp_path / "unet/model.onnx", asked, SILENT))
    assert b"text_embeds" in plan
    assert int64s([2, 77, 32]) in plan


@pytest.fixture(scope="session")
def watched(encoder):
    """A plan built while Ctrl-C is ignored, the progress events, and the handlers of Ctrl-C that
    were set during the build."""
    events, handlers = [], set()

    def step(phase):
        events.append(("step", phase))
        handlers.add(signal.getsignal(signal.SIGINT))

    watch = SimpleNamespace(
        start=lambda phase, parent, steps: events.append(("start", phase, parent, steps)),
        step=step,
        finish=lambda phase: events.append(("finish", phase)),
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        plan = bytes(trt.build("rtx", file_of(encoder), order(encoder.part), watch))
    finally:
        signal.signal(signal.SIGINT, before)
    return SimpleNamespace(plan=plan, events=events, handlers=handlers)


def test_a_static_plan_knows_its_one_shape(watched):
    assert int64s([1, 3, 32, 32]) in watched.plan
    assert int64s([1, 3, 64, 64]) not in watched.plan


def file_of(encoder):
    return encoder.folder / "vae_encoder/model.onnx"


def test_version_compatible_plans_are_built_without_host_code(encoder, watched):
    """TensorRT-RTX cannot build one with the lean runtime in it, which is host code."""
    asked = order(encoder.part, compatible=("version",))
    assert trt.build("rtx", file_of(encoder), asked, SILENT).nbytes > len(watched.plan) / 2
    assert tensorrt_rtx.Runtime(tensorrt_rtx.Logger()).engine_host_code_allowed is False


def test_errors_of_the_builder_are_passed_on(encoder, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no ONNX")
    with pytest.raises(UserError, match="rtx cannot"):
        trt.build("rtx", tmp_path / "model.onnx", order(encoder.part), SILENT)
    nothing = replace(order(encoder.part), profile={})
    with pytest.raises(UserError, match=r"rtx cannot build vae_encoder for sm_89: .*profile"):
        trt.build("rtx", file_of(encoder), nothing, SILENT)


def test_phases_are_reported_and_drawn(watched, monkeypatch, capsys):
    events = watched.events
    started = [event[1] for event in events if event[0] == "start"]
    assert events[0][:3] == ("start", started[0], None)
    assert events[-1] == ("finish", started[0])
    assert sorted(started) == sorted(event[1] for event in events if event[0] == "finish")
    assert {event[1] for event in events if event[0] == "step"} <= set(started)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with phases() as progress:
        progress.log("one line")
        for what, *arguments in events[:-1]:  # the build has not finished, so it is drawn
            getattr(progress, what)(*arguments)
    drawn = capsys.readouterr().err
    assert "one line" in drawn
    assert started[0] in drawn


@pytest.mark.parametrize("name", ["/tmp/a[/b]c", "a[bold]b", ":heart:"])
def test_names_are_drawn_as_they_are(monkeypatch, capsys, name):
    for terminal in ("1", "0"):
        monkeypatch.setenv("TTY_COMPATIBLE", terminal)
        with status() as log:
            log(name)
        assert name in capsys.readouterr().err
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with phases() as progress:
        progress.log(name)
        progress.start(name, None, 1)
        progress.finish(name)


def test_an_ignored_ctrl_c_stays_ignored(watched):
    """Shells ignore it for processes in the background."""
    assert watched.handlers == {signal.SIG_IGN}


@pytest.fixture
def premade(encoder, monkeypatch):
    """For tests of what follows an export: exporting the encoder copies its ONNX file."""
    monkeypatch.setattr(
        exporter,
        "write",
        lambda part, folder, *_: shutil.copytree(
            encoder.folder / part.folder, folder / part.folder
        ),
    )
    return builder.Request("rtx", TARGETS, shapes.parse(None, "1x32x32"), exporter.TRT_OPSET)


def test_ctrl_c_ends_a_build_and_leaves_nothing(encoder, half, premade, tmp_path):
    # a shell that starts the tests in the background makes them ignore Ctrl-C
    own, before, steps = signal.getsignal(signal.SIGINT), signal.default_int_handler, []
    signal.signal(signal.SIGINT, before)

    def step(phase):
        steps.append(phase)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    watch = SimpleNamespace(start=SILENT.start, step=step, finish=SILENT.finish)
    out = tmp_path / "out"
    try:
        with pytest.raises(KeyboardInterrupt):
            builder.export(half, (encoder.part,), out, premade, lambda line: None, watch)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, own)
    assert len(steps) < 10  # of hundreds
    assert list(tmp_path.iterdir()) == []


@whole
def test_a_full_disk_is_an_error_of_one_sentence(built, half_folder, tmp_path):
    """The text encoder's ONNX file fits, but not its plan."""
    plan = (built.out / "sm_89/text_encoder/model.plan").stat().st_size
    with small_disk(tmp_path, plan - 1_000_000) as reason:
        asked = ("--trt", "--out", tmp_path / "out", "--target", "sm_89")
        sentence = refused("export", half_folder, *asked)
        assert sentence == f"fastdiff: {tmp_path}/out cannot be written: {reason}"
        assert list(tmp_path.iterdir()) == []


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import StableDiffusionPipeline
from fastdiff.engines import manifest
from fastdiff.export import onnx, shapes, trt
from fastdiff.export.parts import parts

torch.set_num_threads(1)
premade, out = Path(sys.argv[1]), Path(sys.argv[2])
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[3], dtype=torch.float16)
part = parts(pipe, torch.float16)[-1]
onnx.write = lambda part, folder, *_: shutil.copytree(premade, folder / part.folder)
request = trt.Request("rtx", ("sm_89", "sm_120"), shapes.parse(None, "1x32x32"), 22)

def begin():
    \"\"\"Start a process that exports; return when its first build is under way.\"\"\"
    ready, tell = os.pipe()
    if not (child := os.fork()):
        watch = SimpleNamespace(
            start=lambda *_: os.write(tell, b"."), step=lambda *_: None, finish=lambda *_: None
        )
        trt.export(pipe, (part,), out, request, lambda line: None, watch)
        os._exit(0)
    os.close(tell)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return child

def whole():
    found = [manifest.check(place) for place in manifest.find(out)]
    return [made.target for made in found] == ["sm_120", "sm_89"]

start = time.perf_counter()
assert os.waitpid(begin(), 0)[1] == 0 and whole()
seconds, killed, left, moment = time.perf_counter() - start, 0, 0, random.Random(0)
shutil.rmtree(out)
while killed < 20:
    child = begin()
    time.sleep(moment.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
    left += any(out.parent.iterdir())
    if out.exists():  # it was killed between its last file and its end
        assert whole()
        shutil.rmtree(out)
assert left, "no kill left anything that the next run had to clear away"
assert os.waitpid(begin(), 0)[1] == 0 and whole()
assert [path.name for path in out.parent.iterdir()] == [out.name]
"""


# 20 s; test_ctrl_c_ends_a_build_and_leaves_nothing ends one build at one moment.
@pytest.mark.product
def test_a_killed_build_leaves_nothing_that_loads(encoder, half_folder, tmp_path):
    (tmp_path / "place").mkdir()
    arguments = (encoder.folder / "vae_encoder", tmp_path / "place/out", half_folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


KNOWN = "rtx knows sm_75, sm_80, sm_86, sm_89, sm_120, sm_121"
BAD = {
    f"there is no GPU here to build for; name one with --target: {KNOWN}": ("--flavor", "rtx"),
    "rtx cannot build for sm_90 here: it knows sm_75": ("--flavor", "rtx", "--target", "sm_90"),
    "rtx cannot build for 89 here: it knows sm_75": ("--target", "89"),
    "tensorrt needs tensorrt (": ("--flavor", "tensorrt", "--target", "sm_89"),
    "pip install 'fastdiff-engine[trt]'; rtx cannot build for sm_90": ("--target", "sm_89,sm_90"),
    "--flavor is 'x'; choose auto, tensorrt or rtx": ("--flavor", "x"),
    "got --shapes and --static; give only one": ("--shapes", "1x64x64", "--static", "1x64x64"),
    "--shapes is '1x64x64'; give MIN:OPT:MAX": ("--shapes", "1x64x64"),
    "--shapes has '64x64'; give pictures x height": ("--shapes", "64x64:1x64x64:1x64x64"),
    "--static has '0x64x64'": ("--static", "0x64x64"),
    "--static has '-1x64x64'": ("--static", "-1x64x64"),
    "count is 2, 1, 3; it must not decrease": ("--shapes", "2x64x64:1x64x64:3x64x64"),
    "width is 64, 64, 32; it must not decrease": ("--shapes", "1x64x64:1x64x64:1x64x32"),
    "1x64x72: width 72 is not a multiple of 16, which unet needs; 16 suits every network": (
        *("--static", "1x64x72", "--target", "sm_89"),
    ),
    "--compatible is 'x'; choose hardware or version": ("--compatible", "x"),
    "rtx has no --compatible hardware; give each GPU as a --target": (
        *("--compatible", "version,hardware", "--target", "sm_89"),
    ),
    "rtx keeps no timing cache; leave out --timing-cache": (
        *("--timing-cache", "{tmp}/cache", "--target", "sm_89"),
    ),
    "--timing-cache {tmp}/no/cache: the folder {tmp}/no": ("--timing-cache", "{tmp}/no/cache"),
    "--opset 23 has an attention op that TensorRT takes in fp16 and bf16 only": (
        *("--opset", "23", "--dtype", "fp32", "--target", "sm_89"),
    ),
    "--opset is 'x'": ("--opset", "x"),
    "--opset is '21'; choose auto or 22 to 23 for bf16": ("--opset", "21", "--dtype", "bf16"),
    "--verify needs --onnx": ("--verify",),
    "give one of --onnx, --trt and --triton-repo": ("--onnx", "--out", "{tmp}/other"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_an_error_of_one_sentence(tmp_path, monkeypatch, message):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in BAD[message]]
    sentence = refused("export", "--trt", "--out", tmp_path / "out", *arguments)
    assert message.replace("{tmp}", str(tmp_path)) in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    arguments = ("export", "--trt", "--out", tmp_path / "out", "--target", "sm_89")
    sentence = refused(*arguments, "--flavor", "rtx")
    assert "rtx needs tensorrt_rtx" in sentence
    assert "pip install 'fastdiff-engine[trt-rtx]'" in sentence
    sentence = refused(*arguments)
    assert "pip install 'fastdiff-engine[trt]';" in sentence
    assert "pip install 'fastdiff-engine[trt-rtx]'" in sentence


@pytest.mark.parametrize("option", ["flavor", "target", "shapes", "static", "timing-cache"])
def test_engine_options_go_with_trt(tmp_path, option):
    sentence = refused("export", "--onnx", "--out", tmp_path / "out", f"--{option}", "x")
    assert sentence == f"fastdiff: --{option} needs --trt"


def test_a_folder_that_exists_is_left_alone(tmp_path):
    sentence = refused("export", "--trt", "--out", tmp_path, "--target", "sm_89")
    assert f"{tmp_path} exists already" in sentence
