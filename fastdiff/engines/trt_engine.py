"""A TensorRT engine on torch's memory, run on torch's current stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.engines import manifest, trt
from fastdiff.engines.bound import Bound
from fastdiff.runtime.recordings import buffer


class TrtEngine:
    """A plan as an `Engine`; see `trt.load` for what it refuses.

    Each set of shapes has its own execution context, which a CUDA graph needs unchanged. All
    contexts share their working memory, because callers take turns (`graphs.in_turn`).
    """

    recordable = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device, self._made = device, manifest.read(folder)
        self._engine = trt.load(folder, device)
        self._memory = buffer((self._engine.device_memory_size_v2,), torch.uint8, device)

    def refusal(self, inputs: Mapping[str, Sequence[int]]) -> str | None:
        """See `Engine.refusal`: compares with the manifest's profile."""
        return outside(self._made.profiles, inputs)

    def bind(
        self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
    ) -> Bound:
        """See `Engine.bind`."""
        types = self._made.inputs | self._made.outputs
        memory = {
            name: buffer(shape, getattr(torch, types[name][0]), self.device).zero_()
            for name, shape in (dict(inputs) | dict(outputs)).items()
        }
        context = self._context()
        for name, shape in inputs.items():
            context.set_input_shape(name, tuple(shape))
        for name, tensor in memory.items():
            context.set_tensor_address(name, tensor.data_ptr())

        def run() -> None:
            stream = torch.cuda.current_stream(self.device)
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(f"{self._made.flavor} could not run {self._made.part}")

        return Bound({n: memory[n] for n in inputs}, {n: memory[n] for n in outputs}, run)

    def _context(self) -> Any:
        """An execution context for the only profile, in the shared working memory."""
        library = trt.library(self._made.flavor)
        given = strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        if specialization := getattr(library, "DynamicShapesKernelSpecializationStrategy", None):
            given = self._engine.create_runtime_config()
            given.set_execution_context_allocation_strategy(strategy)
            # a graph keeps its first kernels, so they must not be placeholders for better ones
            given.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        with torch.cuda.device(self.device):
            context = self._engine.create_execution_context(given)
            if context.active_optimization_profile != 0:  # only the first context starts with it
                stream = torch.cuda.current_stream(self.device)
                context.set_optimization_profile_async(0, stream.cuda_stream)
        context.set_device_memory(self._memory.data_ptr(), self._memory.nbytes)
        return context


def outside(
    profiles: Sequence[manifest.Profile], inputs: Mapping[str, Sequence[int]]
) -> str | None:
    """Why no profile covers inputs of these shapes; None if one does."""
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
