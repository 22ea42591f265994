"""OpenVINO computes on torch's memory, in the dtype that is asked for."""

import openvino
import pytest
import torch
from openvino import opset13 as ops

from fastdiff.engines.bound import reason_of
from fastdiff.engines.openvino import Compiled, check
from fastdiff.errors import UserError

DTYPES = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}
CPU = torch.device("cpu")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def product(folder, dtype, weight):
    """Write a file that computes x [B, K] -> y [B, N] = x @ weight."""
    x = ops.parameter([-1, weight.shape[0]], DTYPES[dtype], "x")
    constant = ops.convert(ops.constant(weight.numpy()), DTYPES[dtype])
    y = ops.matmul(x, constant, False, False)
    x.output(0).set_names({"x"})
    y.output(0).set_names({"y"})
    openvino.save_model(openvino.Model([y], [x]), folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_in_the_dtype_on_bound_memory(tmp_path, dtype):
    """float32 must not run in bfloat16, whose error is a thousand times as large."""
    if dtype is torch.bfloat16 and not BF16:
        with pytest.raises(UserError, match="OpenVINO has no BF16 on this processor; draw in fp32"):
            check(CPU, dtype)
        return
    weight = torch.randn(64, 32)
    compiled = Compiled(product(tmp_path, dtype, weight), dtype)
    for rows in (3, 5):
        bound = compiled.bind({"x": (rows, 64)}, {"y": (rows, 32)})
        for _ in range(2):
            x = torch.randn(rows, 64)
            bound.inputs["x"].copy_(x)
            bound.run()
            exact = bound.inputs["x"].double() @ weight.double()
            assert bound.outputs["y"].dtype == dtype
            error = float((bound.outputs["y"].double() - exact).abs().max() / exact.abs().max())
            minimum, maximum = {torch.float32: (0, 1e-6), torch.bfloat16: (1e-4, 1e-2)}[dtype]
            assert minimum <= error <= maximum


def test_it_takes_as_many_threads_as_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    seen = []
    compile_model = openvino.Core.compile_model

    def compiling(self, *given):
        made = compile_model(self, *given)
        seen.append(made.get_property("INFERENCE_NUM_THREADS"))
        return made

    monkeypatch.setattr(openvino.Core, "compile_model", compiling)
    compiled = Compiled(product(tmp_path, torch.float32, torch.eye(4)), torch.float32)
    compiled.bind({"x": (1, 4)}, {"y": (1, 4)})
    assert seen == [1]


def test_a_file_that_it_cannot_run_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"OpenVINO cannot read .*model\.onnx: "):
        Compiled(tmp_path / "model.onnx", torch.float32)
    compiled = Compiled(product(tmp_path, torch.float32, torch.eye(4)), torch.float32)
    with pytest.raises(UserError, match=r"OpenVINO cannot compile .* for x \[1, 5\]: "):
        compiled.bind({"x": (1, 5)}, {"y": (1, 4)})
    with pytest.raises(UserError, match="backend openvino runs on a CPU; the pipeline is on cuda"):
        check(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("Exception from x.cpp:1:\nstd::bad_alloc")]
)
def test_running_out_of_memory_is_not_blamed_on_the_file(error):
    with pytest.raises(MemoryError):
        reason_of(error)
    assert reason_of(RuntimeError("Exception from x.cpp:1:\nno such file\n")) == "no such file"
