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
from fastdiff.models.lora import is_lora
from fastdiff.models.settings import settings
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
    multiple: int
    """Of which height and width must be: at others the halves of its U meet at other sizes."""

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
        if sample.numel() == 0 or given.text.numel() == 0:
            raise Unsupported("it was given an empty tensor")
        if any(side % self.multiple for side in sample.shape[2:]):
            raise Unsupported(
                f"sample has the sides {list(sample.shape[2:])}; the engine takes multiples of"
                f" {self.multiple}"
            )
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
    """An open engine and the network it was made from, as `fingerprint.of_network` hashes it."""

    def __init__(
        self, engine: Engine, inputs: Ports, outputs: Ports, network_sha256: str, multiple: int
    ) -> None:
        widths = {name: sides[-1] for name, (_, *sides) in inputs.items() if name in ADDED}
        network = EngineUNet(
            engine, widths, tuple(inputs["timestep"][1:]), channels=outputs["out_sample"][2]
        )
        self.step = EngineStep(
            network, Plans(network, searches=False), inputs, engine.device, multiple
        )
        self._network_sha256, self._same = network_sha256, False
        self._compared: tuple[Unwritten, Any] | None = None
        """The weights and settings that were hashed last: gigabytes, not to be read every call."""

    def borrow(self, module: nn.Module, loan: Loan) -> EngineStep:
        """The engine, if `module` computes what it computes; borrows nothing of it.

        Raises Unsupported where something has been added to the module (an adapter, FreeU, a
        foreign attention processor), or its weights or settings are not those that the engine was
        made from.
        """
        loan.adopt(_need_plain(module))
        if not self._was_compared(module):
            self._compared = Unwritten(module.parameters()), settings(module)
            self._same = fingerprint.of_network(module) == self._network_sha256
        if not self._same:
            raise Unsupported(
                "weights or settings other than those the engine was made from; export and compile"
                " again"
            )
        return self.step

    def _was_compared(self, module: nn.Module) -> bool:
        if self._compared is None:
            return False
        weights, numbers = self._compared
        return weights.are(module.parameters()) and weights.hold() and numbers == settings(module)


def open_unet(unet: nn.Module, options: Options) -> Source:
    """The engine of `options` for a U-Net; ONNX Runtime's is exported first where none is named.

    Raises:
        UserError: it cannot be exported, read, or run here.
    """
    try:
        _need_plain(unet)
    except Unsupported as unsupported:
        raise UserError(f"unet cannot run on {options.backend}: {unsupported}") from unsupported
    if options.backend == "tensorrt":
        return _open_trt(unet, options)
    if options.engines is None:
        return _export(unet, options)
    return _open_onnx(unet, Path(options.engines), options)


def check_folder(folder: Path) -> None:
    """UserError unless `folder` is what `fastdiff export` wrote, every byte of it."""
    if (folder / exported.FILE).exists():
        exported.check(folder)
    else:
        for engine in manifest.find(folder):
            manifest.check(engine)


def _need_plain(unet: nn.Module) -> Loan:
    """A rehearsal; raises Unsupported unless the U-Net computes what its config and weights say."""
    loan = Loan(unet, rehearsal=True)
    if borrow_unet(unet, loan).ip_adapters is not None:
        raise Unsupported("an IP-Adapter, which an engine does not have")
    if any(map(is_lora, unet.modules())):  # active or not: nothing would tell of a switch
        raise Unsupported(
            "a LoRA adapter, which an engine does not have; fuse it, unload it, export and compile"
            " again"
        )
    return loan


def _export(unet: nn.Module, options: Options) -> Source:
    from fastdiff.export import onnx
    from fastdiff.export.parts import unet_part

    with tempfile.TemporaryDirectory(prefix="fastdiff-") as name:
        folder, part = Path(name), unet_part(unet, next(unet.parameters()).dtype)
        written = onnx.write(part, folder, onnx.ORT_OPSET, lambda line: None)
        (row,) = onnx.document((part,), onnx.ORT_OPSET, (written,))["parts"]
        return _onnx_source(unet, folder, row, options)


def _open_onnx(unet: nn.Module, folder: Path, options: Options) -> Source:
    for part in exported.read(folder)["parts"]:
        if part["file"].split("/")[0] == "unet":
            exported.check_part(folder, part)
            return _onnx_source(unet, folder, part, options)
    raise UserError(f"{folder} holds no U-Net; fastdiff export --onnx writes one")


def _onnx_source(unet: nn.Module, folder: Path, part: dict[str, Any], options: Options) -> Source:
    session = Session(folder / part["file"], _device(unet), options.ort_graphs)
    inputs, outputs = part["inputs"], part["outputs"]
    return Source(session, inputs, outputs, part["network_sha256"], _multiple(unet))


def _open_trt(unet: nn.Module, options: Options) -> Source:
    if options.engines is None:
        raise UserError("the backend tensorrt needs Options.engines: fastdiff export --trt")
    found = {f.parent.name: f for f in manifest.find(Path(options.engines)) if f.name == "unet"}
    if not found:
        raise UserError(f"{options.engines} holds no U-Net; fastdiff export --trt writes one")
    device = _device(unet)
    folder = found.get(trt.here(device.index or 0) or "", next(iter(found.values())))
    made, engine = manifest.read(folder), TrtEngine(folder, device)
    return Source(engine, made.inputs, made.outputs, made.network_sha256, _multiple(unet))


def _device(unet: nn.Module) -> torch.device:
    return next(unet.parameters()).device


def _multiple(unet: Any) -> int:
    times: int = 2**unet.num_upsamplers
    return times
