"""A TensorRT engine on torch's memory and on the stream that is torch's when it runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastdiff.engines import manifest, trt
from fastdiff.engines.bound import Bound


class TrtEngine:
    """A plan as an `Engine`; see `trt.load` for what it refuses.

    One execution context serves every shape: the callers take turns (`runtime.graphs.in_turn`).
    """

    recordable = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device, self._made = device, manifest.read(folder)
        self._engine = trt.load(folder, device)
        with torch.cuda.device(device):
            self._context = self._engine.create_execution_context()

    def refusal(self, inputs: Mapping[str, Sequence[int]]) -> str | None:
        """See `Engine.refusal`: the profile of its manifest."""
        return outside(self._made.profiles, inputs)

    def bind(
        self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
    ) -> Bound:
        """See `Engine.bind`."""
        types = self._made.inputs | self._made.outputs
        memory = {
            name: torch.zeros(
                tuple(shape), dtype=getattr(torch, types[name][0]), device=self.device
            )
            for name, shape in (dict(inputs) | dict(outputs)).items()
        }

        def run() -> None:
            for name, shape in inputs.items():
                self._context.set_input_shape(name, tuple(shape))
            for name, tensor in memory.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            stream = torch.cuda.current_stream(self.device)
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(f"{self._made.flavor} could not run {self._made.part}")

        return Bound({n: memory[n] for n in inputs}, {n: memory[n] for n in outputs}, run)


def outside(
    profiles: Sequence[manifest.Profile], inputs: Mapping[str, Sequence[int]]
) -> str | None:
    """Why no profile holds inputs of these shapes; None where one does."""
    reasons = [_outside(profile, inputs) for profile in profiles]
    return None if None in reasons else reasons[0]


def _outside(profile: manifest.Profile, inputs: Mapping[str, Sequence[int]]) -> str | None:
    for name, shape in inputs.items():
        ends = profile.get(name)
        if ends is None:
            continue
        low, high = ends["min"], ends["max"]
        if not all(a <= got <= b for a, got, b in zip(low, shape, high, strict=True)):
            return (
                f"{name} has the shape {list(shape)}, the engine takes {low} to {high};"
                " export with wider --shapes"
            )
    return None
