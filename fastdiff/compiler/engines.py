"""A file of `fastdiff export` in place of our U-Net, for as long as it computes the same."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.compiler.fits import refuse
from fastdiff.compiler.options import Options
from fastdiff.compiler.steps import Extras
from fastdiff.engines import exported, fingerprint, manifest, trt
from fastdiff.engines.bound import Engine
from fastdiff.engines.network import ADDED, EngineUNet
from fastdiff.engines.ort import Session
from fastdiff.engines.trt_engine import TrtEngine
from fastdiff.errors import UserError
from fastdiff.models import Loan, Unsupported, borrow_unet
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.models.lora import is_lora, parts
from fastdiff.models.watch import Unwritten
from fastdiff.runtime import graphs
from fastdiff.runtime.hoist import Conditions
from fastdiff.runtime.loop import Plans

Ports = dict[str, list[Any]]
"""Of a file's inputs or outputs: dtype and sides, a named side being free."""


@dataclass(frozen=True)
class EngineStep:
    """What `steps.StepUNet` is to our network."""

    network: EngineUNet
    plans: Plans
    inputs: Ports
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.inputs["sample"][0])
        return kind

    def fit(self, sample: Tensor, given: Conditions) -> None:
        """Raise Unsupported unless the engine takes exactly these tensors."""
        refuse(**{"image_embeds, which engines do not take": given.image_embeds})
        tensors = {name: getattr(given, name) for name in ADDED}
        tensors |= {"sample": sample, "encoder_hidden_states": given.text}
        for name, tensor in tensors.items():
            if (tensor is None) != (name not in self.inputs):
                what = "is missing" if tensor is None else "is no input of the engine"
                raise Unsupported(f"{name} {what}")
            if tensor is not None:
                self._fit(name, tensor)
        shapes = {n: tuple(t.shape) for n, t in tensors.items() if t is not None}
        batch = given.text.shape[0]
        if reason := self.network.engine.refusal(shapes | {"sample": (batch, *sample.shape[1:])}):
            raise Unsupported(reason)

    def _fit(self, name: str, tensor: Tensor) -> None:
        kind, *sides = self.inputs[name]
        if len(sides) != tensor.ndim or any(
            isinstance(side, int) and side != got
            for side, got in zip(sides, tensor.shape, strict=True)
        ):
            raise Unsupported(
                f"{name} has the shape {list(tensor.shape)}; the engine takes {sides}"
            )
        if tensor.dtype != getattr(torch, kind) or tensor.device != self.device:
            raise Unsupported(
                f"{name} is {tensor.dtype} on {tensor.device}, the engine takes {kind} on"
                f" {self.device}"
            )

    def __call__(
        self, sample: Tensor, timestep: Tensor, given: Conditions, extras: Extras
    ) -> Tensor:
        """`UNet2DConditionModel.forward`: [B, C, Y, X] -> [B, C, Y, X]."""
        refuse(**extras._asdict())
        if timestep.numel() != 1:
            raise Unsupported("it was given a timestep for each picture")
        network = self.network
        rows = network.time_rows(timestep, given.text_embeds, given.time_ids, given.timestep_cond)
        with graphs.in_turn(self.device):
            return channels_first(network.predict(channels_last(sample), rows, given.text))


class Source:
    """An open engine and the weights it was made from."""

    def __init__(self, engine: Engine, inputs: Ports, outputs: Ports, weights: str) -> None:
        device = engine.device
        widths = {name: sides[-1] for name, (_, *sides) in inputs.items() if name in ADDED}
        network = EngineUNet(
            engine, widths, tuple(inputs["timestep"][1:]), channels=outputs["out_sample"][2]
        )
        self.step = EngineStep(network, Plans(network), inputs, device)
        self._weights, self._foreign = weights, False
        self._known: Unwritten | None = None
        """The weights that were found to be the engine's."""

    def borrow(self, module: nn.Module, loan: Loan) -> EngineStep:
        """The engine, if `module` computes what it computes; borrows nothing of it.

        Raises Unsupported where something has been added to the module (an adapter, FreeU, a
        foreign attention processor), or its weights are not those that the engine was made from.
        """
        _need_plain(module)
        known = self._known
        if known is None or not known.are(module.parameters()) or not known.hold():
            self._compare(module)
        return self.step

    def _compare(self, module: nn.Module) -> None:
        # once they differed they are not compared again: that would be gigabytes at every call
        self._foreign = self._foreign or fingerprint.of_weights(module) != self._weights
        if self._foreign:
            raise Unsupported(
                "weights other than those the engine was made from; export and compile again"
            )
        self._known = Unwritten(module.parameters())


def open_unet(unet: nn.Module, options: Options) -> Source:
    """The engine of `options` for a U-Net; ONNX Runtime's is exported first where none is named.

    Raises:
        UserError: it cannot be exported, read, or run here.
    """
    try:
        _need_plain(unet)
    except Unsupported as unsupported:
        raise UserError(f"unet cannot run on {options.backend}: {unsupported}") from unsupported
    device = next(unet.parameters()).device
    if options.backend == "tensorrt":
        return _open_trt(options, device)
    if options.engines is None:
        return _export(unet, options)
    return _open_onnx(Path(options.engines), device, options)


def check_folder(folder: Path) -> None:
    """UserError unless `folder` is what `fastdiff export` wrote, every byte of it."""
    if (folder / exported.FILE).exists():
        exported.check(folder)
    else:
        for engine in manifest.find(folder):
            manifest.check(engine)


def _need_plain(unet: nn.Module) -> None:
    """Raise Unsupported unless the U-Net computes what its config and weights say."""
    if borrow_unet(unet, Loan(unet, rehearsal=True)).ip_adapters is not None:
        raise Unsupported("an IP-Adapter, which an engine does not have")
    if any(is_lora(layer) and parts(layer) for layer in unet.modules()):
        raise Unsupported(
            "a LoRA adapter, which an engine does not have; fuse it, export, compile again"
        )


def _export(unet: nn.Module, options: Options) -> Source:
    from fastdiff.export import onnx
    from fastdiff.export.parts import unet_part

    first = next(unet.parameters())
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as name:
        folder, part = Path(name), unet_part(unet, first.dtype)
        written = onnx.write(part, folder, onnx.ORT_OPSET, lambda line: None)
        (row,) = onnx.document((part,), onnx.ORT_OPSET, (written,))["parts"]
        return _onnx_source(folder, row, first.device, options)


def _open_onnx(folder: Path, device: torch.device, options: Options) -> Source:
    for part in exported.read(folder)["parts"]:
        if part["file"].split("/")[0] == "unet":
            exported.check_part(folder, part)
            return _onnx_source(folder, part, device, options)
    raise UserError(f"{folder} holds no U-Net; fastdiff export --onnx writes one")


def _onnx_source(
    folder: Path, part: dict[str, Any], device: torch.device, options: Options
) -> Source:
    session = Session(folder / part["file"], device, options.ort_graphs)
    return Source(session, part["inputs"], part["outputs"], part["weights_sha256"])


def _open_trt(options: Options, device: torch.device) -> Source:
    if options.engines is None:
        raise UserError("the backend tensorrt needs Options.engines: fastdiff export --trt")
    found = {f.parent.name: f for f in manifest.find(Path(options.engines)) if f.name == "unet"}
    if not found:
        raise UserError(f"{options.engines} holds no U-Net; fastdiff export --trt writes one")
    folder = found.get(trt.here(device.index or 0) or "", next(iter(found.values())))
    made = manifest.read(folder)
    return Source(TrtEngine(folder, device), made.inputs, made.outputs, made.weights_sha256)
