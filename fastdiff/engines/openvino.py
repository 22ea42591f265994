"""OpenVINO on torch's memory: inputs and outputs are bound in place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import installed
from fastdiff.engines.bound import Bound, reason_of
from fastdiff.errors import UserError
from fastdiff.runtime.recordings import buffer

PRECISIONS = {torch.float32: "FP32", torch.bfloat16: "BF16"}
"""The precisions it computes in, by OpenVINO's names for what a processor supports."""


def check(device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless OpenVINO is installed and computes in `dtype` on `device`."""
    core = _openvino().Core()
    if device.type != "cpu":
        raise UserError(f"backend openvino runs on a CPU; the pipeline is on {device}")
    if dtype not in PRECISIONS:
        raise UserError(f"backend openvino computes in fp32 or bf16; the pipeline is {dtype}")
    if PRECISIONS[dtype] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError(f"OpenVINO has no {PRECISIONS[dtype]} on this processor; draw in fp32")


class Compiled:
    """An ONNX file in OpenVINO on the CPU. It is compiled for each bound set of shapes, since free
    sides are slower. It computes in the dtype of the file's weights, on as many threads as torch.

    Args:
        file: written by `fastdiff export --onnx`.
        dtype: of its weights.

    Raises:
        UserError: OpenVINO is not installed, does not compute in `dtype`, or cannot read the file.
    """

    device = torch.device("cpu")
    recordable = False

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        check(self.device, dtype)
        self._file, self._dtype = file, dtype
        self._core = _openvino().Core()
        try:
            self._model = self._core.read_model(file)  # maps the weights beside it
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot read {file}: {reason_of(error)}") from error

    def refusal(self, inputs: Mapping[str, Sequence[int]]) -> str | None:
        """None: it takes any sides."""
        return None

    def bind(
        self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
    ) -> Bound:
        """See `Engine.bind`. Raises UserError if OpenVINO cannot compile it for these sides."""
        openvino = _openvino()
        model = self._model.clone()  # shares the weights
        try:
            model.reshape({name: openvino.PartialShape(list(inputs[name])) for name in inputs})
            compiled = self._core.compile_model(model, "CPU", _settings(self._dtype))
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
            raise UserError(
                f"OpenVINO cannot compile {self._file} for {shapes}: {reason_of(error)}"
            ) from error
        request = compiled.create_infer_request()
        made: dict[str, Tensor] = {}
        for name, shape in (*inputs.items(), *outputs.items()):
            port = compiled.input(name) if name in inputs else compiled.output(name)
            dtype = getattr(torch, _TORCH[port.element_type.to_string()])
            made[name] = buffer(shape, dtype, self.device).zero_()
            request.set_tensor(port, _shared(openvino, made[name], port.element_type))

        def run() -> None:
            request.infer(share_inputs=True, share_outputs=True)

        return Bound({n: made[n] for n in inputs}, {n: made[n] for n in outputs}, run)


_TORCH = {"f32": "float32", "bf16": "bfloat16", "f64": "float64", "i64": "int64"}
"""torch's name of each of OpenVINO's types."""


def _settings(dtype: torch.dtype) -> dict[str, Any]:
    """One picture at a time on all of torch's threads; float32 is not rounded to less."""
    exact = dtype is torch.float32
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if exact else "bf16",
        "EXECUTION_MODE_HINT": "ACCURACY" if exact else "PERFORMANCE",
    }


def _shared(openvino: Any, tensor: Tensor, kind: Any) -> Any:
    """The tensor as an OpenVINO tensor in the same memory."""
    if tensor.dtype is not torch.bfloat16:
        return openvino.Tensor(tensor.numpy(), shared_memory=True)
    bits = tensor.view(torch.int16).numpy()  # numpy has no bfloat16
    return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), kind)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"backend openvino needs openvino ({error}); {installed.pip('onnx', 'openvino')}"
        ) from error
    return openvino
