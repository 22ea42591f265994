"""Exported ONNX files have Optimum's names and standard ops, and compute torch's numbers and
pictures."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import run, run_json
from diffusers import SD3Transformer2DModel

from fastdiff.bench import presets
from fastdiff.bench.preset_unet import UNetPreset
from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import onnx as exporter
from fastdiff.export import parity, picture
from fastdiff.export.folder import check_new, new_folder
from fastdiff.export.parts import parts
from fastdiff.families import family

FILES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


class Shallow(UNetPreset):
    """A preset's architecture with as few layers as possible, but with repeated ones."""

    def __init__(self, preset, **changed):
        texts = tuple(replace(text, layers=2) for text in preset.texts)
        super().__init__(**vars(preset) | {"texts": texts} | changed)

    def network(self, scale):
        cls, config = super().network(scale)
        return cls, config | {"layers_per_block": 1}

    def autoencoder(self, scale):
        config = super().autoencoder(scale) | {"layers_per_block": 1}
        return {
            name: value[:2] if isinstance(value, list) else value for name, value in config.items()
        }


ONE_LEVEL = {"channels": (320,), "heads": (5,), "attention": (True,), "depth": (1,)}
SMALL = {"sd15": Shallow(presets.SD15), "sdxl": Shallow(presets.SDXL, **ONE_LEVEL)}
SCALE = 0.1
"""Of the widths of the networks."""


@pytest.fixture(
    scope="session",
    # "small" is a small Stable Diffusion 1.5; the XL's U-Net has one level only
    params=[
        "small",
        pytest.param("demo", marks=pytest.mark.product),
        pytest.param("sdxl", marks=pytest.mark.product),
    ],
)
def exported(request, export_onnx):
    if request.param == "small":
        return request.getfixturevalue("small_export")
    if request.param == "demo":
        return export_onnx("demo", request.getfixturevalue("demo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", SMALL)
        pipe = presets.build(request.param, SCALE, torch.float32, "cpu")
        arguments = ("--preset", request.param, "--scale", SCALE)
        return export_onnx(request.param, pipe, *arguments)


def is_xl(exported):
    return hasattr(exported.pipe, "text_encoder_2")


def session(exported, part):
    file = exported.folder / part / "model.onnx"
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def texts(exported):
    return ("text_encoder", "text_encoder_2") if is_xl(exported) else ("text_encoder",)


def test_files_are_standard_onnx(exported):
    for part in (*FILES, *texts(exported)[1:]):
        file = exported.folder / part / "model.onnx"
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions


def test_tensors_have_optimums_names(exported):
    more = ["text_embeds", "time_ids"] if is_xl(exported) else []
    expected = {
        "unet": (["sample", "timestep", "encoder_hidden_states", *more], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    for text in texts(exported):
        first = ["last_hidden_state", "pooler_output"]
        if text == "text_encoder_2":
            first = ["text_embeds", "last_hidden_state"]
        layers = getattr(exported.pipe, text).config.num_hidden_layers
        states = [f"hidden_states.{i}" for i in range(layers + 1)]
        expected[text] = (["input_ids"], first + states)
    for part, (inputs, outputs) in expected.items():
        opened = session(exported, part)
        assert [port.name for port in opened.get_inputs()] == inputs
        assert [port.name for port in opened.get_outputs()] == outputs
    unet = {port.name: port.shape for port in session(exported, "unet").get_inputs()}
    assert unet["sample"] == ["batch_size", 4, "height", "width"]
    assert unet["timestep"] == []
    assert unet["encoder_hidden_states"][:2] == ["batch_size", "sequence_length"]


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def test_folder_holds_the_files_that_a_pipeline_is_read_from(exported):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler
    from transformers import CLIPTokenizer

    folder = exported.folder
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == type(exported.pipe).__name__
    for part in (*FILES, *texts(exported)):
        config = json.loads((folder / part / "config.json").read_text())
        assert "_name_or_path" not in config
    vae = json.loads((folder / "vae_decoder/config.json").read_text())
    assert vae["scaling_factor"] == exported.pipe.vae.config.scaling_factor
    read = EulerDiscreteScheduler if is_xl(exported) else DDIMScheduler
    scheduler = read.from_pretrained(folder / "scheduler")
    assert public(scheduler.config) == public(exported.pipe.scheduler.config)
    for text in texts(exported):
        place = folder / text.replace("text_encoder", "tokenizer")
        again = CLIPTokenizer.from_pretrained(place)
        assert again("purple car").input_ids == exported.pipe.tokenizer("purple car").input_ids
        assert (place / "vocab.json").is_file()  # what transformers 4, and so Optimum, reads
        assert (place / "merges.txt").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_verify_says_what_it_compared(exported):
    report = exported.document["parity"]
    assert report["passed"]
    assert report["psnr_db"] >= 45
    assert json.loads((exported.folder / "parity.json").read_text()) == report
    assert "FAILED" not in (exported.folder / "parity.md").read_text()
    unet = [row for row in report["rows"] if row["part"] == "unet"]
    assert len(unet) == 9  # three shapes, three timesteps
    assert "unet: verifying" in exported.progress


def sha256(file):
    """The hash of an ONNX file and, if its weights lie in a file of their own, of that file."""
    weights = file.with_name(file.name + "_data")
    beside = weights.read_bytes() if weights.exists() else b""
    return hashlib.sha256(file.read_bytes() + beside).hexdigest()


def within_budget(net, session, cases, call):
    """Check that a session is within the budget of diffusers' own module, case by case.

    Exact is the module in float64; the budget follows from torch's error on one thread, in the
    worse of its two memory formats.
    """
    exact_net = copy.deepcopy(net).double()
    channels_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for inputs in cases:
                feed = {name: value.numpy() for name, value in inputs.items()}
                got = torch.from_numpy(session.run(None, feed)[0])
                exact = call(exact_net, {k: v.double() for k, v in inputs.items()})
                assert got.shape == exact.shape
                error, *eager = (
                    float((value - exact).abs().max())
                    for value in (got, call(net, inputs), call(channels_last, inputs))
                )
                assert error <= 2 * (max(eager) + 2**-23 * float(exact.abs().max()))
    finally:
        torch.set_num_threads(threads)


def test_unet_is_within_the_budget_of_diffusers_own(exported):
    unet = exported.pipe.unet
    cases = []
    for batch, height, width, step in (
        *((1, 16, 8, 0.0), (1, 16, 8, 731.25), (4, 24, 16, 21.0)),
        *((4, 24, 16, 731.25), (2, 8, 40, 731.25), (2, 8, 40, 981.0)),
    ):
        inputs = {
            "sample": torch.randn(batch, 4, height, width),
            "timestep": torch.tensor(step),
            "encoder_hidden_states": torch.randn(batch, 9, unet.config.cross_attention_dim),
        }
        if is_xl(exported):
            pooled = exported.pipe.text_encoder_2.config.projection_dim
            inputs["text_embeds"] = torch.randn(batch, pooled)
            inputs["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch)
        cases.append(inputs)

    def call(net, inputs):
        more = dict(inputs)
        first = [more.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
        return net(*first, added_cond_kwargs=more or None, return_dict=False)[0]

    within_budget(unet, session(exported, "unet"), cases, call)


def test_vae_is_within_the_budget_of_diffusers_own(exported):
    vae, factor = exported.pipe.vae, exported.pipe.vae_scale_factor
    sizes = ((1, 11, 5), (4, 4, 4), (2, 8, 13))
    latents = [{"latent_sample": torch.randn(b, 4, y, x)} for b, y, x in sizes]
    pixels = [{"sample": torch.rand(b, 3, factor * y, factor * x) * 2 - 1} for b, y, x in sizes]
    within_budget(
        *(vae, session(exported, "vae_decoder"), latents),
        lambda net, inputs: net.decode(inputs["latent_sample"]).sample,
    )
    within_budget(
        *(vae, session(exported, "vae_encoder"), pixels),
        lambda net, inputs: net.encode(inputs["sample"]).latent_dist.parameters,
    )


def test_a_picture_of_25_steps_equals_torchs(exported):
    """Drawn by a loop over ONNX Runtime sessions, with the pipeline's own scheduler."""
    pipe, steps, guidance = exported.pipe, 25, 4.0
    sessions = {part: session(exported, part) for part in ("unet", "vae_decoder", *texts(exported))}
    states, pooled = [], None
    for text in texts(exported):
        tokenizer = getattr(pipe, text.replace("text_encoder", "tokenizer"))
        ids = tokenizer(
            ["", "red heart"], padding="max_length", truncation=True, return_tensors="np"
        ).input_ids
        names = [port.name for port in sessions[text].get_outputs()]
        out = dict(zip(names, sessions[text].run(None, {"input_ids": ids}), strict=True))
        if is_xl(exported):
            last = getattr(pipe, text).config.num_hidden_layers
            states.append(out[f"hidden_states.{last - 1}"])
            pooled = out.get("text_embeds", pooled)
        else:
            states.append(out["last_hidden_state"])
    side = pipe.unet.config.sample_size
    feed = {"encoder_hidden_states": np.concatenate(states, -1)}
    if is_xl(exported):
        pixels = float(side * pipe.vae_scale_factor)
        ids = np.array([[pixels, pixels, 0, 0, pixels, pixels]] * 2, dtype=np.float32)
        # Without a negative prompt SDXL takes zeros, not the empty text.
        feed["encoder_hidden_states"][0] = 0
        pooled[0] = 0
        feed |= {"text_embeds": pooled, "time_ids": ids}
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(3))
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([x, x]), t).numpy()
        feed |= {"sample": sample, "timestep": np.array(t, dtype=np.float32)}
        uncond, cond = torch.from_numpy(sessions["unet"].run(None, feed)[0]).chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    latents = (x / pipe.vae.config.scaling_factor).numpy()
    got = sessions["vae_decoder"].run(None, {"latent_sample": latents})[0]
    expected = pipe(
        "red heart",
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
    ).images
    error = (torch.from_numpy(got) / 2 + 0.5).clamp(0, 1) - expected
    assert -10 * error.square().mean().log10() >= 45


def test_dry_run_reports_the_same_and_writes_nothing(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "PRESETS", SMALL)
    asked = ("--onnx", "--out", tmp_path / "x", "--dry-run")
    code, document, _ = run_json("export", *exported.arguments, *asked)
    assert code == 0
    assert document["dry_run"]
    assert document["opset"] == exported.document["opset"]
    written = [dict(part) for part in exported.document["parts"]]
    for part in written:
        assert part.pop("bytes") > 0
        assert part.pop("seconds") > 0
        assert part.pop("sha256") == sha256(exported.folder / part["file"])
    assert document["parts"] == written
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_in_their_own_file(small_demo, premade_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "EXTERNAL_ABOVE", 1000)
    encoder = parts(small_demo, torch.float32)[:1]
    (written,) = exporter.export(small_demo, encoder, tmp_path / "out", 20, lambda line: None)
    place = tmp_path / "out/text_encoder"
    assert (place / "model.onnx_data").stat().st_size > 1e6
    assert (place / "model.onnx").stat().st_size < 1e6
    assert written.bytes == sum(path.stat().st_size for path in place.glob("model.onnx*"))
    rows = parity.verify_part(encoder[0], Session(place / "model.onnx", torch.device("cpu")))
    assert all(row.passed for row in rows)


def test_a_failed_verdict_exits_1(tmp_path, monkeypatch):
    row = parity.Row("unet", "out_sample", "1×8×8", 1.0, 1e-6, 3e-6, 1.0, 0.5)
    monkeypatch.setattr(exporter, "export", lambda pipe, parts, out, *_: out.mkdir() or ())
    monkeypatch.setattr(parity, "verify", lambda *_: parity.Parity((row,), 12.0))
    code, out, _ = run("export", "--onnx", "--out", tmp_path / "out", "--verify")
    assert code == 1
    assert "**FAILED**" in out
    assert not json.loads((tmp_path / "out/parity.json").read_text())["passed"]


def test_a_disk_that_is_full_after_the_files_is_an_error_of_one_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "export", lambda pipe, parts, out, *_: out.mkdir() or ())
    monkeypatch.setattr(parity, "verify", lambda *_: parity.Parity((), 99.0))
    monkeypatch.setattr("fastdiff.written.write_file", fail)
    code, _, err = run("export", "--onnx", "--out", tmp_path / "out", "--verify")
    assert code == 2
    assert f"{tmp_path}/out cannot be written: No space left on device" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no such operator\nat length"), "text_encoder cannot be exported: no such"),
        (OSError(28, "No space left on device"), "cannot be written: No space left on device"),
    ],
)
def test_a_failed_export_leaves_nothing_behind(
    small_folder, premade_onnx, tmp_path, monkeypatch, error, message
):
    def fail(*_, **__):
        raise error

    if isinstance(error, OSError):
        monkeypatch.setattr(exporter, "write_json", fail)
    else:
        monkeypatch.undo()  # torch's exporter runs
        monkeypatch.setattr(torch.onnx, "export", fail)
    code, out, err = run("export", small_folder, "--onnx", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


BAD = {
    "{tmp} exists already": ("--onnx", "--out", "{tmp}"),
    "the folder {tmp}/no does not exist": ("--onnx", "--out", "{tmp}/no/out"),
    "--opset is '99'; choose auto or 18 to 23": ("--onnx", "--out", "{tmp}/out", "--opset", "99"),
    "--opset is 'x'": ("--onnx", "--out", "{tmp}/out", "--opset", "x"),
    "--opset is '²'": ("--onnx", "--out", "{tmp}/out", "--opset", "²"),
    "--dry-run, which makes none": ("--onnx", "--out", "{tmp}/out", "--dry-run", "--verify"),
    "--verify needs fp32 or fp16": ("--onnx", "--out", "{tmp}/out", "--dtype", "bf16", "--verify"),
    "--dtype is 'int8'": ("--onnx", "--out", "{tmp}/out", "--dtype", "int8"),
    "has no model_index.json": ("{tmp}", "--onnx", "--out", "{tmp}/out"),
}


@pytest.mark.parametrize(("message", "arguments"), BAD.items())
def test_bad_input_is_an_error_of_one_sentence(tmp_path, message, arguments):
    code, out, err = run("export", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("fastdiff: ")
    assert message.replace("{tmp}", str(tmp_path)) in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    code, _, err = run("export", "--onnx", "--out", tmp_path / "out")
    assert code == 2
    assert "export needs onnxscript" in err
    assert "pip install 'fastdiff-engine[onnx]'" in err


def test_networks_with_unsupported_inputs_are_refused(demo):
    pipe = copy.deepcopy(demo)
    pipe.unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(UserError, match="unet has class_embed_type 'timestep'"):
        parts(pipe, torch.float32)
    for key, value in (
        ("sample_size", None),
        ("sample_size", [8, 16]),
        ("cross_attention_dim", [8]),
    ):
        pipe = copy.deepcopy(demo)
        pipe.unet.register_to_config(**{key: value})
        with pytest.raises(UserError, match=rf"unet has {key} .*; supported is one number"):
            parts(pipe, torch.float32)
    pipe = copy.deepcopy(demo)
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="vae is a Linear; supported are AutoencoderKL and"):
        parts(pipe, torch.float32)


def test_a_vae_that_overflows_in_half_stays_in_single(monkeypatch):
    monkeypatch.setattr(presets, "PRESETS", SMALL)
    pipe = presets.build("sdxl", SCALE, torch.float16, "cpu")
    pipe.vae.register_to_config(force_upcast=True)
    *_, unet, decoder, encoder = parts(pipe, torch.float16)
    assert unet.dtype is torch.float16
    assert {decoder.dtype, encoder.dtype} == {torch.float32}
    assert {weight.dtype for weight in decoder.module.parameters()} == {torch.float32}
    assert next(pipe.vae.parameters()).dtype is torch.float16


def test_a_vae_that_diffusers_runs_in_half_is_in_half(demo):
    """force_upcast is the default of a VAE's config; only XL's pipelines read it."""
    pipe = copy.deepcopy(demo).to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    networks = parts(pipe, torch.float16)
    assert {part.dtype for part in networks} == {torch.float16}

    def run_of(part):
        module = copy.deepcopy(part.module)  # the pipeline's own module calls what run_of returns
        return lambda inputs: module(*inputs.values())

    with torch.no_grad():
        runs = {part.folder: run_of(part) for part in networks}
        assert picture.psnr(pipe, networks, runs) >= 45


def test_a_link_where_the_partial_folder_would_be_is_left_alone(tmp_path):
    """Emptying it would empty the folder that the link points to."""
    kept = tmp_path / "elsewhere/kept"
    kept.parent.mkdir()
    kept.touch()
    (tmp_path / ".out.partial").symlink_to(kept.parent)
    with pytest.raises(UserError, match=r"\.out\.partial is a link"), new_folder(tmp_path / "out"):
        pass
    assert kept.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), None])
def test_a_name_that_the_system_refuses_is_an_error_of_one_sentence(tmp_path, monkeypatch, failure):
    if failure:  # as for a folder without permission, which root does not get

        def stat(*_, **__):
            raise failure

        monkeypatch.setattr(Path, "stat", stat)
    name = tmp_path / ("out" if failure else "a" * 300)
    with pytest.raises(UserError, match=r"cannot be written: (Permission denied|File name too)"):
        check_new(name)


@pytest.mark.parametrize("largest", [7, pytest.param(8, marks=pytest.mark.product)])
def test_positions_of_any_number_of_patches(largest, tmp_path):
    """Also of odd numbers, for which torch's exporter divides a negative number, which ONNX rounds
    up."""
    config = {
        "sample_size": 8,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": largest,
    }
    net = SD3Transformer2DModel(**config).eval()
    part = family("mmdit").denoised.part("transformer", net, torch.float32)
    own = part.module.net.pos_embed
    for rows in range(1, largest + 1):
        for columns in range(1, largest + 1):
            latents = torch.randn(1, 16, 2 * rows, 2 * columns)
            assert torch.equal(own(latents), net.pos_embed(latents))
    exporter.write(part, tmp_path, 20, lambda line: None)
    in_ort = Session(tmp_path / part.file, torch.device("cpu"))
    odd = [{"batch_size": 1, "height": 2 * a, "width": 2 * b} for a, b in ((3, 4), (4, 5), (7, 1))]
    part = replace(part, cases=tuple(sides | {"sequence_length": 9} for sides in odd))
    verdicts = parity.verify_part(part, in_ort)
    assert len(verdicts) == 9
    assert all(row.passed for row in verdicts)
