"""Runs an exported engine in place of our network, while it computes the same."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.compiler.options import Options
from fastdiff.engines import exported, fingerprint, manifest, openvino, ort, trt
from fastdiff.engines.bound import Engine
from fastdiff.engines.network import EngineNetwork, Ports
from fastdiff.engines.trt_engine import TrtEngine
from fastdiff.errors import UserError
from fastdiff.families import Denoised, Kind, settings
from fastdiff.models import Loan, Unsupported
from fastdiff.models.lora import is_lora
from fastdiff.models.watch import Unwritten
from fastdiff.recipes import denoiser
from fastdiff.runtime.denoiser import Denoiser
from fastdiff.runtime.loop import Plans


@dataclass(frozen=True)
class Replaced:
    """A network that an engine is to replace."""

    name: str
    """The name of the component."""
    module: nn.Module
    kind: Kind
    """How fastdiff runs it without an engine."""
    denoised: Denoised
    options: Options

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def rehearsed(self, module: nn.Module) -> Loan:
        """Borrow without changing anything; Unsupported unless config and weights alone define what
        the module computes."""
        loan = Loan(module, rehearsal=True)
        self.denoised.unexported(self.kind.borrow(module, loan).network)
        # even an inactive one: switching it on would go unnoticed
        if any(map(is_lora, module.modules())):
            raise Unsupported(
                "a LoRA adapter, which an engine does not have; fuse it, unload it, export and"
                " compile again"
            )
        return loan

    def source(
        self, engine: Engine, inputs: Ports, outputs: Ports, network_sha256: str
    ) -> "Source":
        multiple, most = self.denoised.multiple(self.module), self.denoised.most(self.module)
        told, float32 = partial(self.denoised.for_file, self.module), self.denoised.float32
        network = EngineNetwork(engine, inputs, outputs, multiple, most, told, float32)
        return Source(network, network_sha256, self.rehearsed)


class Source:
    """An open engine, and the hash (`fingerprint.of_network`) of the network it was made from."""

    def __init__(
        self, network: EngineNetwork, network_sha256: str, rehearsed: Callable[[nn.Module], Loan]
    ) -> None:
        plans = Plans(network, searches=False)
        self.denoiser = Denoiser(network, plans, network.predict_in_turn)
        self._rehearsed = rehearsed
        self._network_sha256, self._same = network_sha256, False
        self._compared: tuple[Unwritten, Any] | None = None
        """The weights and settings hashed last; hashing them at every call is too slow."""

    def borrow(self, module: nn.Module, loan: Loan) -> Denoiser:
        """The engine, if it computes what `module` computes; no weight is borrowed.

        Raises Unsupported if something was added to the module (an adapter, FreeU, a foreign
        attention processor), or if its weights or settings are not those that the engine was made
        from.
        """
        loan.adopt(self._rehearsed(module))
        if not self._was_compared(module):
            self._compared = Unwritten(module.parameters()), settings(module)
            self._same = fingerprint.of_network(module) == self._network_sha256
        if not self._same:
            raise Unsupported(
                "weights or settings other than those the engine was made from; export and compile"
                " again"
            )
        return self.denoiser

    def _was_compared(self, module: nn.Module) -> bool:
        if self._compared is None:
            return False
        weights, numbers = self._compared
        return weights.are(module.parameters()) and weights.hold() and numbers == settings(module)


def kind_of_engine(
    name: str, module: nn.Module, kind: Kind, denoised: Denoised, options: Options
) -> Kind:
    """How a network runs on the engine that `options` choose. If an ONNX backend has no engine
    folder, the network is exported first.

    Raises:
        UserError: it cannot be exported, read, or run here.
    """
    wanted = Replaced(name, module, kind, denoised, options)
    try:
        wanted.rehearsed(module)
    except Unsupported as reason:
        raise UserError(f"{name} cannot run on {options.backend}: {reason}") from reason
    if options.backend in _RUNTIMES:
        check_runtime(options.backend, wanted.device, wanted.dtype)
    if options.backend == "tensorrt":
        source = _open_trt(wanted)
    elif options.engines is None:
        source = _export(wanted)
    else:
        source = _open_onnx(wanted, Path(options.engines))
    return replace(
        kind,
        borrow=source.borrow,
        planned=lambda network, sizes: [],
        runner=options.backend,
        frozen=True,
        exact=partial(kind.borrow, searches=options.tactics),
        tactics=options.tactics,
    )


_RUNTIMES = {"ort": ort, "openvino": openvino}
"""The runtimes that read ONNX files."""


def check_runtime(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless the ONNX runtime `backend` is installed and runs `dtype` on `device`."""
    _RUNTIMES[backend].check(device, dtype)


def export(pipe: Any, folder: Path, log: Callable[[str], object]) -> None:
    """Export the engines of `pipe`, the network that denoises and the VAE's decoder, into the empty
    `folder`, as `fastdiff export --onnx` does. UserError if they cannot be exported."""
    from fastdiff.export import onnx
    from fastdiff.export.folder import write_json
    from fastdiff.export.parts import networks

    onnx.check_packages(verify=False)
    dtype = denoiser(pipe).dtype
    parts = tuple(part for part in networks(pipe, dtype) if part.folder != "vae_encoder")
    opset = onnx.check_opset("auto", onnx.ORT_OPSET, dtype)
    written = tuple(onnx.write(part, folder, opset, log) for part in parts)
    write_json(folder / exported.FILE, onnx.document(parts, opset, written))


def exported_part(folder: Path, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The ONNX folder's entry for the network `name`. UserError unless it is there in `dtype`."""
    part, kind = exported.part(folder, name), str(dtype).removeprefix("torch.")
    if part["dtype"] != kind:
        raise UserError(
            f"{folder} holds {name} in {part['dtype']}, the pipeline is in {kind}; export it"
            " in the pipeline's --dtype"
        )
    return part


def check_folder(folder: Path) -> None:
    """UserError unless `folder` holds, byte for byte, what `fastdiff export` wrote."""
    if (folder / exported.FILE).exists():
        exported.check(folder)
    else:
        for engine in manifest.find(folder):
            manifest.check(engine)


def _export(wanted: Replaced) -> Source:
    from fastdiff.export import onnx

    module = wanted.module
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as name:
        folder = Path(name)
        part = wanted.denoised.part(wanted.name, module, wanted.dtype)
        opset = onnx.check_opset("auto", onnx.ORT_OPSET, wanted.dtype)
        written = onnx.write(part, folder, opset, lambda line: None)
        (row,) = onnx.document((part,), opset, (written,))["parts"]
        return _onnx_source(wanted, folder, row)


def _open_onnx(wanted: Replaced, folder: Path) -> Source:
    return _onnx_source(wanted, folder, exported_part(folder, wanted.name, wanted.dtype))


def _onnx_source(wanted: Replaced, folder: Path, part: dict[str, Any]) -> Source:
    options = wanted.options
    file = folder / part["file"]
    engine = opened(options.backend, file, wanted.device, wanted.dtype, options.ort_graphs)
    return wanted.source(engine, part["inputs"], part["outputs"], part["network_sha256"])


def opened(
    backend: str, file: Path, device: torch.device, dtype: torch.dtype, graphs: bool = False
) -> Engine:
    """Open an ONNX file with weights of `dtype` in "ort" or "openvino"; they raise UserError."""
    if backend == "openvino":
        return openvino.Compiled(file, dtype)
    return ort.Session(file, device, graphs)


def _open_trt(wanted: Replaced) -> Source:
    engines, name = wanted.options.engines, wanted.name
    if engines is None:
        raise UserError(
            "the backend tensorrt needs Options.engines; give the folder that fastdiff export --trt"
            " wrote"
        )
    found = {f.parent.name: f for f in manifest.find(Path(engines)) if f.name == name}
    if not found:
        raise UserError(f"{engines} holds no {name}; fastdiff export --trt writes one")
    here = trt.here(wanted.device.index or 0) or ""
    folder = found.get(here, next(iter(found.values())))
    made, engine = manifest.read(folder), TrtEngine(folder, wanted.device)
    return wanted.source(engine, made.inputs, made.outputs, made.network_sha256)
