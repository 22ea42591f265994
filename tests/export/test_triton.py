"""Triton model repositories, checked by ONNX Runtime and by Triton's own protobuf messages."""

import json
import shutil

import onnx
import onnxruntime
import pytest
from command import run, run_json
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fastdiff.engines import exported, fingerprint, manifest
from fastdiff.export import triton
from fastdiff.export.parts import parts

FILES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
OF_ONNX = {
    "tensor(float)": model_config_pb2.TYPE_FP32,
    "tensor(float16)": model_config_pb2.TYPE_FP16,
    "tensor(int64)": model_config_pb2.TYPE_INT64,
}


@pytest.fixture(scope="module")
def repository(small_onnx, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "models"
    code, printed, err = run_json("export", small_onnx, "--triton-repo", "--out", out)
    assert code == 0, err
    return out, printed


def configs(out):
    """Every config.pbtxt of a repository, read by Triton's own protobuf."""
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for path in out.glob("*/config.pbtxt")
    }


def test_every_folder_is_a_model_and_there_is_nothing_else(repository, small_onnx):
    """The server takes each folder of a repository for a model, and each folder in it for a
    version."""
    out, printed = repository
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert [model["name"] for model in printed["models"]] == list(FILES)
    for name in FILES:
        assert sorted(p.name for p in (out / name).iterdir()) == ["1", "config.pbtxt"]
        assert [p.name for p in (out / name / "1").iterdir()] == ["model.onnx"]
        written, source = out / name / "1/model.onnx", small_onnx / name / "model.onnx"
        assert written.read_bytes() == source.read_bytes()
        assert source.stat().st_nlink == 1  # onnx refuses weights that have two names


def test_configs_ask_for_what_onnx_runtime_sees(repository):
    out, _ = repository
    found = configs(out)
    assert found.keys() == set(FILES)
    for name, config in found.items():
        assert (config.name, config.backend) == (name, "onnxruntime")
        assert config.platform == "onnxruntime_onnx"
        session = onnxruntime.InferenceSession(out / name / "1/model.onnx")
        batch = [-1] if config.max_batch_size else []
        for configured, ports in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            assert [port.name for port in configured] == [port.name for port in ports]
            for mine, port in zip(configured, ports, strict=True):
                sides = [side if isinstance(side, int) else -1 for side in port.shape]
                # For Triton a scalar is one element; it refuses a reshape of one without a batch.
                assert batch + list(mine.dims) == (sides or [1])
                assert mine.data_type == OF_ONNX[port.type]
                assert not mine.HasField("reshape")


def test_only_models_whose_tensors_all_have_the_batch_are_batched(repository):
    found = configs(repository[0])
    assert found["unet"].max_batch_size == 0  # all pictures share one timestep
    assert not found["unet"].HasField("dynamic_batching")
    for name in ("text_encoder", "vae_decoder", "vae_encoder"):
        assert found[name].max_batch_size == triton.MAX_BATCH
        assert found[name].HasField("dynamic_batching")
        session = onnxruntime.InferenceSession(repository[0] / name / "1/model.onnx")
        ports = (*session.get_inputs(), *session.get_outputs())
        assert {port.shape[0] for port in ports} == {"batch_size"}


def test_a_pipeline_is_exported_first(
    repository, small_folder, premade_onnx, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastdiff.export.parts.parts", lambda *of, **how: parts(*of, **how)[:1])
    out = tmp_path / "models"
    code, _, err = run("export", small_folder, "--triton-repo", "--out", out)
    assert code == 0, err
    assert "text_encoder: exporting" in err
    assert configs(out) == {"text_encoder": configs(repository[0])["text_encoder"]}
    onnx.checker.check_model(out / "text_encoder/1/model.onnx", full_check=True)
    assert {path.name for path in tmp_path.rglob("*")} == {
        *("models", "text_encoder", "1", "config.pbtxt", "model.onnx")
    }


def test_large_weights_go_with_their_graph(small_onnx, tmp_path):
    shutil.copytree(small_onnx, tmp_path / "exported")
    file = tmp_path / "exported/text_encoder/model.onnx"
    model = onnx.load(file)
    file.unlink()
    onnx.save(
        model, file, save_as_external_data=True, location="model.onnx_data", size_threshold=1000
    )
    path = tmp_path / "exported/export.json"
    document = json.loads(path.read_text())
    document["parts"][0]["sha256"] = exported.sha256_of(file)
    path.write_text(json.dumps(document))
    code, _, err = run(
        "export", tmp_path / "exported", "--triton-repo", "--out", tmp_path / "models"
    )
    assert code == 0, err
    version = tmp_path / "models/text_encoder/1"
    assert (version / "model.onnx_data").stat().st_size > 1e5
    for written in (version / "model.onnx", file):
        onnx.checker.check_model(written, full_check=True)
        onnxruntime.InferenceSession(written)


def test_half_precision_and_all_inputs_of_sdxl(tmp_path):
    """Checked by ONNX Runtime on a file with SDXL's ports and without its network."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    inputs = {
        "sample": (half, ["batch_size", 4, "height", "width"]),
        "timestep": (single, []),
        "encoder_hidden_states": (half, ["batch_size", "sequence_length", 64]),
        "text_embeds": (half, ["batch_size", 128]),
        "time_ids": (half, ["batch_size", 6]),
    }
    names = {half: "float16", single: "float32"}
    values = [onnx.helper.make_tensor_value_info(n, *port) for n, port in inputs.items()]
    output = onnx.helper.make_tensor_value_info("out_sample", *inputs["sample"])
    node = onnx.helper.make_node("Identity", ["sample"], ["out_sample"])
    graph = onnx.helper.make_graph([node], "unet", values, [output])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets), tmp_path / "model.onnx"
    )
    ports = {name: [names[kind], *shape] for name, (kind, shape) in inputs.items()}
    row = {"file": "unet/model.onnx", "inputs": ports, "outputs": {"out_sample": ports["sample"]}}
    (model,) = triton.models({"schema": "fastdiff.export/1", "parts": [row]})
    text = triton.config(model)
    triton.check(text, tmp_path / "model.onnx")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert {port.name: port.data_type for port in config.input} == {
        port.name: OF_ONNX[port.type] for port in session.get_inputs()
    }


def test_dry_run_reports_the_same_and_writes_nothing(
    repository, small_onnx, small_folder, tmp_path
):
    for source in (small_onnx, small_folder):
        asked = ("--triton-repo", "--out", tmp_path / "x", "--dry-run")
        code, printed, _ = run_json("export", source, *asked)
        assert code == 0
        assert printed["models"] == repository[1]["models"]
    assert list(tmp_path.iterdir()) == []


def refused(*arguments):
    """The sentence of a command that exits 2."""
    code, out, err = run("export", *arguments)
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("fastdiff: ")
    return sentence


def test_a_damaged_or_incomplete_folder_is_refused(small_onnx, tmp_path):
    source, out = tmp_path / "exported", tmp_path / "models"
    shutil.copytree(small_onnx, source)

    def refused_after(change):
        document = json.loads((small_onnx / "export.json").read_text())
        change(document)
        (source / "export.json").write_text(json.dumps(document))
        sentence = refused(source, "--triton-repo", "--out", out)
        assert list(tmp_path.iterdir()) == [source]
        return sentence

    def of(part, what):
        return next(row for row in part["parts"] if row["file"].startswith("unet"))[what]

    assert "has schema fastdiff.export/9, but this fastdiff reads" in refused_after(
        lambda d: d.update(schema="fastdiff.export/9")
    )
    assert "export.json is damaged" in refused_after(lambda d: d.pop("parts"))
    assert "export.json is damaged" in refused_after(lambda d: d["parts"][0].pop("inputs"))
    assert "cannot be read" in refused_after(lambda d: d["parts"][0].update(file="../model.onnx"))
    assert "sample TYPE_FP32 [-1, 4, -1, -1], its export.json sample TYPE_FP16" in refused_after(
        lambda d: of(d, "inputs")["sample"].__setitem__(0, "float16")
    )
    assert "has no more, its export.json more TYPE_FP32 [3]" in refused_after(
        lambda d: of(d, "inputs").update(more=["float32", 3])
    )
    assert "bfloat16 tensors, which Triton's ONNX Runtime backend does not take" in refused_after(
        lambda d: of(d, "inputs")["sample"].__setitem__(0, "bfloat16")
    )
    with (source / "unet/model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "unet/model.onnx differs from what was written" in refused_after(lambda d: None)
    (source / "unet/model.onnx").unlink()
    assert "unet/model.onnx cannot be read" in refused_after(lambda d: None)


def test_a_network_of_contrib_operators_is_put_on_a_gpu(small_onnx):
    document = exported.read(small_onnx)
    unet = next(row for row in document["parts"] if row["file"].startswith("unet"))
    unet["contrib_ops"] = {"com.microsoft::GroupNorm": ["GroupNorm_0"]}
    for model in triton.models(document):
        config = text_format.Parse(triton.config(model), model_config_pb2.ModelConfig())
        (group,) = config.instance_group
        gpu = model_config_pb2.ModelInstanceGroup.KIND_GPU
        assert (group.count, group.kind == gpu) == (1, model.name == "unet")


def engine(folder, flavor="tensorrt", target="sm_89", part="vae_decoder", **fields):
    """A folder as `fastdiff export --trt` writes it, with a plan that is never run."""
    place = folder / target / part
    place.mkdir(parents=True)
    (place / "model.plan").write_bytes(plan := b"plan for " + target.encode())
    sides = {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [6, 4, 8, 8]}
    made = {
        "part": part,
        "flavor": flavor,
        "version": "10.13",
        "target": target,
        "compatible": [],
        "dtype": "bfloat16",
        "opset": 21,
        "inputs": {"latent_sample": ["bfloat16", "batch_size", 4, "height", "width"]},
        "outputs": {"sample": ["bfloat16", "batch_size", 3, "8*height", "8*width"]},
        "profiles": [{"latent_sample": sides}],
        "plan_bytes": len(plan),
        "plan_sha256": fingerprint.of_files(place / "model.plan"),
        "onnx_sha256": "",
        "config_sha256": "",
        "network_sha256": "",
        "numeric_check": None,
        "numeric_check_reason": "not run",
        "build_seconds": 1.0,
        "versions": {},
    }
    document = manifest.Manifest(**(made | fields)).to_dict()
    (place / "engine.json").write_text(json.dumps(document))
    return folder


def test_engines_of_one_target_are_served_within_their_profile(tmp_path):
    source = engine(engine(tmp_path / "engines"), target="sm_120")
    out = tmp_path / "models"
    assert "has engines for sm_120, sm_89; choose one with --target" in refused(
        source, "--triton-repo", "--out", out
    )
    assert "no engines for sm_90, only for sm_120, sm_89" in refused(
        source, "--triton-repo", "--out", out, "--target", "sm_90"
    )
    code, _, err = run("export", source, "--triton-repo", "--out", out, "--target", "sm_120")
    assert code == 0, err
    assert (out / "vae_decoder/1/model.plan").read_bytes() == b"plan for sm_120"
    (config,) = configs(out).values()
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.max_batch_size == 6
    assert config.HasField("dynamic_batching")
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    (latent,) = config.input
    assert (latent.data_type, latent.dims) == (model_config_pb2.TYPE_BF16, [4, -1, -1])


def test_an_engine_of_one_shape_has_its_batch_in_its_dims(tmp_path):
    ports = {
        "inputs": {"latent_sample": ["float16", 2, 4, 8, 8]},
        "outputs": {"sample": ["float16", 2, 3, 64, 64]},
        "profiles": [{}],
    }
    source = engine(tmp_path / "engines", **ports)
    assert run("export", source, "--triton-repo", "--out", tmp_path / "models")[0] == 0
    (config,) = configs(tmp_path / "models").values()
    assert config.max_batch_size == 0
    assert [list(port.dims) for port in (*config.input, *config.output)] == [
        *([2, 4, 8, 8], [2, 3, 64, 64])
    ]


def test_engines_that_triton_cannot_run_are_refused(tmp_path):
    out = ("--triton-repo", "--out", tmp_path / "models")
    source = engine(tmp_path / "rtx", flavor="rtx")
    assert "was built by TensorRT-RTX, for which Triton has no backend" in refused(source, *out)
    source = engine(tmp_path / "scalar", inputs={"timestep": ["float32"]})
    assert "takes timestep without sides" in refused(source, *out)
    source = engine(tmp_path / "flipped")
    (source / "sm_89/vae_decoder/model.plan").write_bytes(b"plan for sm_98")
    assert "has SHA-256" in refused(source, *out)
    assert not (tmp_path / "models").exists()


def test_bad_input_is_an_error_of_one_sentence(small_onnx, tmp_path):
    out = ("--triton-repo", "--out", tmp_path / "models")
    assert f"{tmp_path} is not a diffusers pipeline" in refused(tmp_path, *out)
    assert f"{tmp_path} exists already" in refused(small_onnx, "--triton-repo", "--out", tmp_path)
    assert "give one of --onnx" in refused(small_onnx, "--out", tmp_path / "x")
    assert "give one of --onnx" in refused("--onnx", "--out", tmp_path / "x", *out)
    assert "--verify needs --onnx" in refused(*out, "--verify")
    exported = refused(small_onnx, *out, "--dtype", "fp16")
    assert "is exported already; leave out --dtype" in exported
    several = refused(small_onnx, *out, "--target", "sm_89")
    assert "--target chooses engines" in several
    assert "--flavor needs --trt" in refused(small_onnx, *out, "--flavor", "rtx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(small_onnx, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    sentence = refused(small_onnx, "--triton-repo", "--out", tmp_path / "models")
    assert "--triton-repo needs tritonclient and onnx" in sentence
    assert "pip install 'fastdiff-engine[onnx,triton-server]'" in sentence
