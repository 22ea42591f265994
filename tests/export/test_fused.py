"""--ort-fused: which nodes become ONNX Runtime's GroupNorm; they compute what torch does."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from command import run, run_json
from exports import read_from
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxscript import ir
from torch import nn

from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import fused, parity
from fastdiff.export import onnx as exporter
from fastdiff.export.parts import parts
from fastdiff.kernels.contract import judge

CPU = torch.device("cpu")


class GroupNorm(OpRun):
    """ONNX Runtime's operator as its documentation defines it, by torch, in float64."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation, channels_last, epsilon, groups):
        assert (gamma.dtype, beta.dtype, channels_last) == (np.float32, np.float32, 1)
        nchw = torch.from_numpy(x).double().permute(0, 3, 1, 2)
        weight, bias = (torch.tensor(value).double() for value in (gamma, beta))
        y = nn.functional.group_norm(nchw, groups, weight, bias, epsilon)
        y = nn.functional.silu(y) if activation else y
        return (y.permute(0, 2, 3, 1).numpy().astype(x.dtype),)


class Norms(nn.Module):
    """GroupNorms that can be fused, and every kind that cannot."""

    def __init__(self):
        super().__init__()
        self.with_silu = nn.GroupNorm(4, 16, eps=1e-3)
        self.alone = nn.GroupNorm(32, 64)
        self.used_twice = nn.GroupNorm(2, 16)
        self.odd = nn.GroupNorm(4, 12)  # three channels each: the kernel reads two at a time
        self.many = nn.GroupNorm(64, 128)
        self.flat = nn.GroupNorm(4, 16)
        for weight in self.parameters():
            nn.init.normal_(weight)

    def forward(self, x):
        silu = nn.functional.silu
        twice = self.used_twice(x)
        return (
            silu(self.with_silu(x)),
            self.alone(torch.cat([x] * 4, 1)),
            twice + silu(twice),
            silu(self.odd(x[:, :12])),
            silu(self.many(torch.cat([x] * 8, 1))),
            self.flat(x.flatten(2)),
        )


FITS = {(4, 1), (32, 0), (2, 0)}  # groups, and whether SiLU is fused as well


def attributes(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node}


def fuse(source, out):
    """The file with its GroupNorms fused, and the names of the new nodes."""
    model = ir.load(source)
    names = fused.fuse(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, out)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_that_fit_the_kernel_are_fused_and_others_are_not(tmp_path, dtype):
    module = Norms().to(dtype).eval()
    sides = {0: "batch", 2: "height", 3: "width"}
    program = torch.onnx.export(
        module,
        (torch.randn(2, 16, 6, 8, dtype=dtype),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=(sides,),
        input_names=["x"],
        verbose=False,
    )
    names = fused.fuse(program.model)
    file = tmp_path / "net/model.onnx"
    file.parent.mkdir()
    ir.save(program.model, file)
    onnx.checker.check_model(file, full_check=True)
    graph = onnx.load(file).graph
    made = [node for node in graph.node if node.domain == "com.microsoft"]
    assert [node.name for node in made] == list(names)
    found = [attributes(node.attribute) for node in made]
    assert {(a["groups"], a["activation"]) for a in found} == FITS
    assert all(a["channels_last"] == 1 for a in found)
    weights = {value.name: value for value in graph.initializer}
    for node in made:
        assert {weights[name].data_type for name in node.input[1:]} == {onnx.TensorProto.FLOAT}
    assert sum(node.op_type == "InstanceNormalization" for node in graph.node) == 3

    theirs = ReferenceEvaluator(str(file), new_ops=[GroupNorm])
    with fused.spelled_out(tmp_path, [SimpleNamespace(file="net/model.onnx")]) as place:
        ours = Session(place / "net/model.onnx", CPU)
    for shape in ((1, 16, 3, 5), (3, 16, 8, 2)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            eager, exact = module(x), Norms.forward(module.double(), x.double())
            module.to(dtype)
        for got in (ours({"x": x}), theirs.run(None, {"x": x.numpy()})):
            for i, (mine, torchs, truth) in enumerate(zip(got, eager, exact, strict=True)):
                verdict = judge(f"output {i}", torch.as_tensor(mine), torchs, truth)
                assert verdict.passed, verdict


@pytest.fixture(scope="module")
def fused_files(small_folder, small_onnx, tmp_path_factory):
    """`small_demo` exported with --ort-fused --verify, without running torch's exporter again."""
    out = tmp_path_factory.mktemp("fused") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "to_program", read_from(small_onnx))
        asked = ("--onnx", "--out", out, "--ort-fused", "--verify")
        code, document, err = run_json("export", small_folder, *asked)
    assert code in (0, 1), err
    return out, document, code


def test_the_files_are_within_the_budget_of_torch(fused_files):
    _, document, code = fused_files
    report = document["parity"]
    assert code == 0, [row for row in report["rows"] if not row["passed"]]
    assert report["passed"]
    assert report["psnr_db"] >= 45
    assert report["spelled_out"] == "com.microsoft::GroupNorm"


def test_export_json_names_every_contrib_node(fused_files, small_onnx):
    out, _, _ = fused_files
    rows = json.loads((out / "export.json").read_text())["parts"]
    for row in rows:
        graph = onnx.load(out / row["file"]).graph
        names = [node.name for node in graph.node if node.domain]
        assert row.get("contrib_ops", {}) == ({"com.microsoft::GroupNorm": names} if names else {})
        before = onnx.load(small_onnx / row["file"]).graph
        norms = [
            sum(node.op_type == "InstanceNormalization" for node in nodes)
            for nodes in (before.node, graph.node)
        ]
        assert norms[0] - norms[1] == len(names)
    assert sum("contrib_ops" in row for row in rows) == 3  # all but the text encoder
    assert "was computed with standard operators" in (out / "parity.md").read_text()


def test_the_files_themselves_compute_what_torch_does(small_demo, fused_files):
    """U-Net and VAE with their contrib nodes, run by onnx's reference evaluator."""
    for part in parts(small_demo, torch.float32)[1:]:
        evaluator = ReferenceEvaluator(str(fused_files[0] / part.file), new_ops=[GroupNorm])

        def evaluate(inputs, evaluator=evaluator):
            feed = {name: value.numpy() for name, value in inputs.items()}
            return tuple(map(torch.from_numpy, evaluator.run(None, feed)))

        rows = parity.verify_part(part, evaluate)
        assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def test_a_wrong_weight_is_caught(small_demo, fused_files, tmp_path):
    """One gamma is 1 % too large."""
    decoder = parts(small_demo, torch.float32)[2]
    model = onnx.load(fused_files[0] / decoder.file)
    gamma = next(value for value in model.graph.initializer if value.name.startswith("gamma_nhwc"))
    gamma.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(gamma) * 1.01, gamma.name)
    )
    (tmp_path / "vae_decoder").mkdir()
    onnx.save(model, tmp_path / decoder.file)
    with fused.spelled_out(tmp_path, [decoder]) as place:
        rows = parity.verify_part(decoder, Session(place / decoder.file, CPU))
    assert not all(row.passed for row in rows)


def test_running_fused_files_on_a_cpu_is_an_error(fused_files):
    with pytest.raises(UserError, match="ONNX Runtime cannot run .*unet/model.onnx: .*GroupNorm"):
        Session(fused_files[0] / "unet/model.onnx", CPU)


def test_the_error_says_why_nothing_can_be_fused(small_folder, premade_onnx, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(*arguments):
        code, output, err = run("export", small_folder, *arguments, "--ort-fused")
        assert (code, output) == (2, "")
        assert list(tmp_path.iterdir()) == []
        return err.splitlines()[-1]

    assert "--ort-fused needs --onnx" in refused("--triton-repo", "--out", out)
    assert "--ort-fused needs --opset 18 to 20, got 21" in refused(
        "--onnx", "--out", out, "--opset", 21
    )
    assert "--ort-fused needs fp32 or fp16" in refused("--onnx", "--out", out, "--dtype", "bf16")
    monkeypatch.setattr("fastdiff.export.parts.parts", lambda *of, **how: parts(*of, **how)[:1])
    assert "no GroupNorm here fits ONNX Runtime's" in refused("--onnx", "--out", out)
