"""ONNX Runtime on torch's memory: inputs and outputs are bound in place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import installed
from fastdiff.engines.bound import Bound, reason_of
from fastdiff.errors import UserError
from fastdiff.runtime.recordings import buffer

TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(double)": (torch.float64, 11),
    "tensor(int64)": (torch.int64, 7),
}
"""By ONNX Runtime's name of a type: torch's, and ONNX's number."""


def check(device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless ONNX Runtime is installed, and runs networks of `dtype` on `device`."""
    _onnxruntime()
    if device.type == "cpu" and dtype is torch.bfloat16:
        raise UserError("ONNX Runtime on a CPU has no bf16 convolution; draw in fp32")


class Session:
    """An ONNX file in ONNX Runtime: with the CUDA provider on a GPU, else on the CPU.

    On a GPU its kernels run on a separate stream; the host waits for torch's stream before each
    run, and for ONNX Runtime's after it.

    Args:
        file: written by `fastdiff export --onnx`.
        device: of its tensors.
        graphs: whether to use its CUDA graphs, one for each bound set of shapes.

    Raises:
        UserError: ONNX Runtime is not installed, has no provider for the device, or cannot run the
            file; the message says which.
    """

    recordable = False  # a run waits for the device, which a graph must not

    def __init__(self, file: Path, device: torch.device, graphs: bool = False) -> None:
        onnxruntime = _onnxruntime()
        self.device, self._graphs = device, graphs and device.type == "cuda"
        self._bound = 0
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # on a CPU this is no faster, but takes a second block: 3.3 GB for SD1.5 at 512²
        options.enable_mem_pattern = device.type != "cpu"
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=[_provider(onnxruntime, device, self._graphs)]
            )
        except UserError:
            raise
        except Exception as error:  # its exceptions share no base class
            raise UserError(f"ONNX Runtime cannot run {file}: {reason_of(error)}") from error
        self._file = file
        self.inputs = {port.name: port.type for port in self._session.get_inputs()}
        self.outputs = {port.name: port.type for port in self._session.get_outputs()}

    def refusal(self, inputs: Mapping[str, Sequence[int]]) -> str | None:
        """None: it takes any sides."""
        return None

    def bind(
        self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
    ) -> Bound:
        """See `Engine.bind`."""
        binding = self._session.io_binding()
        made: dict[str, Tensor] = {}
        for shapes, types, bind in (
            (inputs, self.inputs, binding.bind_input),
            (outputs, self.outputs, binding.bind_output),
        ):
            for name, shape in shapes.items():
                dtype, element = TYPES[types[name]]
                tensor = buffer(shape, dtype, self.device).zero_()
                place = self.device.type, self.device.index or 0
                bind(name, *place, element, list(shape), tensor.data_ptr())
                made[name] = tensor
        options = self._run_options()

        def run() -> None:
            if self.device.type == "cuda":  # ONNX Runtime waits only for its own work
                torch.cuda.current_stream(self.device).synchronize()
            self._session.run_with_iobinding(binding, options)

        return Bound({n: made[n] for n in inputs}, {n: made[n] for n in outputs}, run)

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """All outputs for CPU tensors of any shapes, in new memory."""
        feed = {name: value.numpy() for name, value in inputs.items()}
        try:
            return tuple(torch.from_numpy(out) for out in self._session.run(None, feed))
        except Exception as error:  # its exceptions share no base class
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise UserError(
                f"ONNX Runtime cannot run {self._file} on {shapes}: {reason_of(error)}"
            ) from error

    def _run_options(self) -> Any:
        if not self._graphs:
            return None
        options = _onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._bound))
        self._bound += 1
        return options


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"backend ort needs onnxruntime ({error}); {installed.pip('onnx')}"
        ) from error
    return onnxruntime


def _provider(onnxruntime: Any, device: torch.device, graphs: bool) -> Any:
    if device.type == "cpu":
        return "CPUExecutionProvider"
    name = "CUDAExecutionProvider"
    if device.type != "cuda" or name not in onnxruntime.get_available_providers():
        raise UserError(
            f"this ONNX Runtime has no provider for {device.type}; {installed.pip('onnx-gpu')}"
        )
    return name, {
        "device_id": device.index or 0,
        "enable_cuda_graph": "1" if graphs else "0",
    }
