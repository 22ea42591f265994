"""`fastdiff bench` from its arguments to its exit code: a backend that errs gets no speed."""

import copy
import json
import math
import re
import shutil
import sys

import pytest
import torch

import fastdiff
from fastdiff.bench import run as running
from fastdiff.bench.backends import BACKENDS, Unavailable, choose
from fastdiff.bench.contenders import sharing
from fastdiff.bench.run import Settings
from fastdiff.cli import main
from fastdiff.compiler.decoder import take_decoder
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.regression import documents

pytestmark = pytest.mark.usefixtures("young")
RECEIPT = {"psnr_db", "ssim", "max_abs", "err_vs_fp64", "err_eager_vs_fp64", "passed"}


@pytest.fixture
def bench(tmp_path, small_folder):
    """bench(backends, *more): exit code and JSON document of a bench of 2 steps and 2 rounds."""

    def benched(backends, *more):
        path = tmp_path / "bench.json"
        short = ("--steps", "2", "--rounds", "2", "--device", "cpu", "--json", path)
        words = ("bench", small_folder, "--backends", backends, *short, *more)
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, words)))
        return caught.value.code, json.loads(path.read_text()) if path.exists() else None

    return benched


def weights(module):
    """Bytes of the module's parameters."""
    return sum(weight.nbytes for weight in module.parameters())


def bad_step(pipe):
    pipe.unet.conv_out.bias.data += 1e-4


def bad_picture(pipe):
    pipe.vae.decoder.conv_out.bias.data += 0.05


def bad_nan(pipe):
    pipe.vae.decoder.conv_out.bias.data *= math.nan


def missing(pipe):
    raise Unavailable("this machine has no such engine")


def test_rows_follow_the_schema(bench, capsys, small_demo):
    held = weights(small_demo.unet) + weights(small_demo.vae) + weights(small_demo.text_encoder)
    code, document = bench("channels_last,fastdiff", "--seed", "3")
    out, err = capsys.readouterr()
    assert code == 0, out
    assert document["schema"] == "fastdiff.bench/1"
    assert document["incomplete"] is False
    assert {"cpu", "cores", "threads", "memory_bytes", "gpu"} <= set(document["machine"])
    assert {"fastdiff", "torch", "diffusers"} <= set(document["versions"])
    assert "--seed 3" in document["command"]
    assert [row["backend"] for row in document["rows"]] == ["eager", "channels_last", "fastdiff"]
    for row in document["rows"]:
        assert set(row["receipt"]) >= RECEIPT
        assert row["receipt"]["passed"] is True
        assert len(row["samples_ms"]) == len(row["image_samples_ms"]) == 2
        parts = (row[f"{part}samples_ms"] for part in ("", "text_", "decode_", "image_"))
        for step, text, decode, image in zip(*parts, strict=True):
            assert 0 < text < 2 * step  # the times of the 2 steps include the text encoder
            assert decode == pytest.approx(image - 2 * step)
        vae = row["decode_ratio_vs_eager"]
        assert vae["lo"] <= vae["median"] <= vae["hi"]
        assert row["steps_per_s"] == pytest.approx(2e3 / sum(row["samples_ms"]))
        assert row["images_per_s"] == pytest.approx(2e3 / sum(row["image_samples_ms"]))
        ratio = row["ratio_vs_eager"]
        assert ratio["lo"] <= ratio["median"] <= ratio["hi"]
        assert row["peak_mem_bytes"] > held
        assert row["prepare_s"] >= 0
        assert row["backend"] in out
    assert re.search(r"fastdiff *│ +[\d.]+ \(\d+%\) *│", out)  # the table of parts
    eager = document["rows"][0]
    assert (eager["ratio_vs_eager"]["lo"], eager["ratio_vs_eager"]["hi"]) == (1.0, 1.0)
    assert eager["receipt"]["psnr_db"] is None  # infinite: eager is compared with itself
    assert "round 2 of 2" in err
    assert "round 2 of 2" not in out


def test_wrong_outputs_get_no_speed_and_unavailable_backends_say_why(bench, capsys, monkeypatch):
    broken = ("bad_step", "bad_picture", "bad_nan")
    for backend in (bad_step, bad_picture, bad_nan):
        monkeypatch.setitem(BACKENDS, backend.__name__, backend)
    monkeypatch.setitem(BACKENDS, "inductor", missing)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    # as if bench had chosen the backends and the user had named none
    monkeypatch.setattr(running, "Settings", lambda **of: Settings(**of | {"asked": ()}))
    code, document = bench(",".join((*broken, "inductor")))
    out = capsys.readouterr().out
    assert code == 1
    rows = {row["backend"]: row for row in document["rows"]}
    for name in broken:
        assert rows[name]["receipt"]["passed"] is False
        assert rows[name]["samples_ms"] == rows[name]["image_samples_ms"] == []
        for speed in ("steps_per_s", "images_per_s", "ratio_vs_eager", "image_ratio_vs_eager"):
            assert rows[name][speed] is None
        assert f"\x1b[1;31m{name}: FAILED" in out
        cells = next(line for line in out.splitlines() if name in line)
        assert cells.count("–") == 3  # steps/s, images/s, ratio
    assert rows["eager"]["steps_per_s"] > 0
    assert rows["inductor"]["unavailable"] == "this machine has no such engine"
    assert rows["inductor"]["receipt"] is None
    assert "inductor: not run: this machine has no such engine" in out


def test_openvino_and_onnx_runtime_have_rows_in_the_table(bench, capsys, small_demo, small_onnx):
    code, document = bench("fastdiff,openvino,ort", "--engines", small_onnx)
    assert code == 0
    rows = document["rows"]
    assert [row["backend"] for row in rows] == ["eager", "fastdiff", "openvino", "ort"]
    for row in rows:
        assert row["receipt"]["passed"] is True
        assert row["ratio_vs_eager"]["median"] > 0
        assert row["prepare_s"] >= 0
    for row in rows[2:]:
        assert row["receipt"]["max_abs"] > 0  # not eager under another name
        # its own copy of the U-Net's weights, without the other engine's copy
        assert weights(small_demo.unet) < row["peak_mem_bytes"] < 500e6
    out = capsys.readouterr().out
    assert all(
        f"{name} {document['versions'][name]}" in out for name in ("onnxruntime", "openvino")
    )


def test_both_engines_read_one_export_which_is_removed(bench, monkeypatch):
    """The export holds the VAE decoder as well as the U-Net: an engine replaces both."""
    read = []

    def taking(pipe, engines):
        read.append(engines)
        assert {path.name for path in engines.iterdir()} == {"export.json", "unet", "vae_decoder"}

    written = []

    def export(pipe, folder, log):
        written.append(pipe)
        for name in ("export.json", "unet", "vae_decoder"):
            (folder / name).touch()

    monkeypatch.setattr("fastdiff.compiler.engines.export", export)
    monkeypatch.setitem(BACKENDS, "openvino", taking)
    monkeypatch.setitem(BACKENDS, "ort", taking)
    code, _ = bench("openvino,ort")
    assert code == 0
    assert len(written) == 1
    assert read[0] == read[1]
    assert not read[0].exists()


def test_a_copy_that_shares_weights_duplicates_none_and_leaves_the_first_unchanged(demo):
    pipe = copy.deepcopy(demo)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    there = {weight.data_ptr() for weight in pipe.unet.parameters()}
    other = sharing(pipe)
    assert {weight.data_ptr() for weight in other.unet.parameters()} == there
    for change in (fastdiff.compile, lambda it: it.unet.double(), lambda it: it.unet.to("meta")):
        change(sharing(pipe))
        assert {weight.data_ptr() for weight in pipe.unet.parameters()} == there
        assert all(torch.equal(pipe.unet.state_dict()[name], before[name]) for name in before)
        assert slot_of(pipe.unet) is None


def test_a_backend_that_runs_out_of_memory_is_one_sentence(bench, capsys, monkeypatch):
    def needing(pipe):
        raise MemoryError

    monkeypatch.setitem(BACKENDS, "networks", needing)
    code, document = bench("eager,networks")
    assert (code, document) == (2, None)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "fastdiff: --backends networks cannot run here: not enough memory beside the backends"
        " prepared before it; choose fewer backends"
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("ort", "bf16", "ONNX Runtime on a CPU has no bf16 convolution; draw in fp32"),
        ("openvino", "fp16", "backend openvino computes in fp32 or bf16; the pipeline is torch.f"),
    ],
)
def test_a_dtype_that_an_engine_lacks_is_one_sentence(bench, capsys, backend, dtype, reason):
    code, document = bench(backend, "--dtype", dtype)
    assert (code, document) == (2, None)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fastdiff: --backends {backend} cannot run here: {reason}")


def test_a_missing_extra_is_one_sentence(bench, capsys, monkeypatch, small_onnx):
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, document = bench("openvino", "--engines", small_onnx)
    assert (code, document) == (2, None)
    assert re.search(
        r"--backends openvino cannot run here: backend openvino needs openvino .*; pip install 'fa",
        capsys.readouterr().err,
    )


def test_a_decoder_of_another_vae_is_refused(small_demo, small_onnx):
    pipe = copy.deepcopy(small_demo)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 1
    with pytest.raises(UserError, match=f"{small_onnx} holds the decoder of another VAE; export a"):
        take_decoder(pipe, "openvino", small_onnx)


def test_an_engine_whose_network_ran_eagerly_is_refused(bench, capsys, monkeypatch, small_onnx):
    prepare = BACKENDS["ort"]

    def with_freeu(pipe, engines):
        prepare(pipe, engines)
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)

    monkeypatch.setitem(BACKENDS, "ort", with_freeu)
    code, document = bench("ort", "--engines", small_onnx)
    assert (code, document) == (2, None)
    sentence = "fastdiff: --backends ort cannot run here: the network ran eagerly: FreeU"
    assert capsys.readouterr().err.splitlines()[-1].startswith(sentence)


def test_engines_that_no_backend_runs_are_refused(tmp_path, capsys, small_onnx):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--backends", "fastdiff", "--engines", str(small_onnx)])
    assert caught.value.code == 2
    assert "--engines needs --backends ort, openvino or tensorrt" in capsys.readouterr().err


def test_engines_whose_files_changed_are_refused(tmp_path, capsys, small_folder, small_onnx):
    folder = tmp_path / "onnx"
    shutil.copytree(small_onnx, folder)
    file = folder / "vae_decoder/model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for engines, sentence in (
        (folder, f"{file} differs from what was written; copy it again, or export again"),
        (tmp_path, f"{tmp_path} holds no engine"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["bench", str(small_folder), "--backends", "ort", "--engines", str(engines)])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert err.startswith(f"fastdiff: {sentence}")
        assert err.count("\n") == 1


def test_engines_in_another_dtype_are_refused_before_the_reference(
    bench, capsys, small_onnx, monkeypatch
):
    monkeypatch.setattr(running, "find_truth", None)
    arguments = ["--engines", small_onnx, "--dtype", "bf16"]
    assert bench("openvino", *arguments) == (2, None)
    sentence = f"{small_onnx} holds unet in float32, the pipeline is in bfloat16; export it"
    assert sentence in capsys.readouterr().err


def test_a_requested_backend_that_cannot_run_is_an_error(bench, capsys, monkeypatch):
    """It ends before anything is timed; a backend that bench chose itself only gets a row."""
    monkeypatch.setitem(BACKENDS, "inductor", missing)
    monkeypatch.setattr(running, "interleave", None)
    code, document = bench("eager,inductor", "--steps", "1")
    out, err = capsys.readouterr()
    assert (code, document, out) == (2, None, "")
    assert err.splitlines()[-1] == (
        "fastdiff: --backends inductor cannot run here: this machine has no such engine"
    )


def test_a_killed_run_leaves_a_file_marked_incomplete(bench, tmp_path, monkeypatch):
    """The file holds all rounds up to the kill, and reading it says that it is incomplete."""
    path = tmp_path / "bench.json"
    seen = []

    class Killed(BaseException):
        pass

    def dying(runs, rounds, seed, after_round):
        seen.append(json.loads(path.read_text()))
        drawings = {name: [run()] for name, run in runs.items()}
        for done in (1, 2):
            after_round(done, drawings)
            drawings = {name: [*own, own[0]] for name, own in drawings.items()}
        raise Killed

    monkeypatch.setattr(running, "interleave", dying)
    with pytest.raises(Killed):
        bench("eager,fastdiff")
    prepared, left = seen[0], json.loads(path.read_text())
    assert prepared["incomplete"] is True
    assert left["incomplete"] is True
    assert [row["backend"] for row in left["rows"]] == ["eager", "fastdiff"]
    assert all(row["receipt"]["passed"] and not row["samples_ms"] for row in prepared["rows"])
    assert all(len(row["samples_ms"]) == 2 for row in left["rows"])
    with pytest.raises(
        UserError, match=r"bench\.json is incomplete: its run is still going or was ended"
    ):
        documents.read(path)


def test_a_backend_that_breaks_takes_no_time_from_the_others(bench, capsys, monkeypatch):
    def breaking(pipe):
        raise ZeroDivisionError("an untested kernel")

    monkeypatch.setitem(BACKENDS, "networks", breaking)
    code, document = bench("eager,networks,fastdiff")
    assert code == 1
    eager, broken, ours = document["rows"]
    assert broken["unavailable"] == "it broke: ZeroDivisionError: an untested kernel"
    assert not broken["samples_ms"]
    assert len(eager["samples_ms"]) == len(ours["samples_ms"]) == 2
    out, err = capsys.readouterr()
    assert "networks: not run: it broke: ZeroDivisionError" in out
    assert "in breaking" in err


def test_tensorrt_without_engines_names_the_missing_option(bench, capsys):
    code, document = bench("eager,tensorrt")
    assert (code, document) == (2, None)
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "fastdiff: --backends tensorrt needs --engines; give the folder that fastdiff"
        " export --trt wrote\n",
    )


def test_backends_are_chosen_by_name_and_eager_comes_first():
    assert choose("channels_last, eager") == ("eager", "channels_last")
    assert choose("inductor") == ("eager", "inductor")
    for bad in ("eager,warp", ""):
        with pytest.raises(UserError, match="choose from eager, channels_last, inductor, induc"):
            choose(bad)
