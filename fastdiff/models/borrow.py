"""Borrows weights without a copy: parameters become views into buffers laid out for the kernels.

A lent parameter keeps its identity, shape, values and name; only its memory moves. So savers and
in-place edits work as before (see `state`), and the kernels see those edits.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.kernels.contract import FLOATS
from fastdiff.kernels.dispatch import NATIVE, NATIVE_DTYPES
from fastdiff.kernels.where import on_gpu
from fastdiff.models.lora import Merges, added_by, base_of
from fastdiff.models.reads import EPOCHS, Reads, check_conv
from fastdiff.models.state import Gate, Homes, Lent, bring_home
from fastdiff.models.watch import Unsupported, kind
from fastdiff.models.weights import Norm, Weights, host_memory, may_wait

__all__ = ["Loan", "Norm", "Unsupported", "Weights", "kind"]

_LARGE = 32 << 20
"""From this many bytes on, a buffer's sources wait on the host while it is made: SDXL's text
projections are an eighth of its weights, and must not be on a GPU twice."""


class Loan(Reads):
    """The parameters of `root` that are lent to the runtime, and the conditions for that.

    Weights with LoRA adapters are not lent: the runtime keeps the effective weights in memory of
    its own, which `refresh` writes. A rehearsal raises Unsupported just as the loan would, but
    moves nothing.
    """

    def __init__(
        self,
        root: nn.Module,
        rehearsal: bool = False,
        homes: Homes | None = None,
        rehearsed: Reads | None = None,
        offload: bool = False,
    ) -> None:
        """`homes`: memory that state dicts hold from former loans; `rehearsed`: see Reads;
        `offload`: whether weights that only `hoist` reads wait in host memory."""
        super().__init__(root, rehearsed)
        self._rehearsal, self._homes = rehearsal, {} if homes is None else homes
        self.hoisted = self.waiting = 0
        self._lent: dict[int, Lent] = {}
        self._gate: Gate | None = None
        self._moving = threading.RLock()
        self._looked_at = False
        """Whether parameters with strides that savers refuse went home since the last use."""
        self._held: list[Lent] = []
        """The lent parameters whose former memory a state dict may hold."""
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []
        self._seen: set[int] = set()
        self._merges = Merges()
        self.note(root, "training", root.training)
        if root.training:
            raise Unsupported("a module in training mode")
        first = next(root.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.offloads = offload and may_wait(self.device)
        self._mode = first.is_inference()
        """Whether the weights were made in inference mode: new memory must be made so, too."""
        if self.device.type == "cuda" and self.dtype not in FLOATS:
            raise Unsupported(f"weights of {self.dtype} on a GPU")
        # our CPU kernels read one row per input channel; GPU libraries one per output channel
        on_cpu = self.device.type in ("cpu", "meta") and not on_gpu(first)
        self._input_major = on_cpu and NATIVE is not None and self.dtype in NATIVE_DTYPES

    def linear(self, *layers: nn.Module, hoisted: bool = False, apart: bool = False) -> Weights:
        """Borrow linear layers (or 1×1 convolutions) of equal input width, stacked along N.

        hoisted: only `hoist` reads them, by `project`; they may wait, unless adapters are on them.
        apart: layers of equal N stay apart, as [layers, N, D], with biases [layers, N].
        """
        bases = [self._base(layer, nn.Linear, nn.Conv2d) for layer in layers]
        for base, layer in zip(bases, layers, strict=True):
            if type(base_of(layer)) is nn.Conv2d:
                check_conv(base, kernel=1, stride=1, padding=0)
        weights: list[Any] = [base.weight for base in bases]
        rows, inner = [w.shape[0] for w in weights], weights[0].shape[1]
        if any(w.shape[1] != inner for w in weights):
            raise Unsupported("layers of different widths with the same input")
        biases: list[Any] = [base.bias for base in bases]
        if len({bias is None for bias in biases}) > 1:
            raise Unsupported("layers of which only some have a bias")
        self._check(*weights, *(bias for bias in biases if bias is not None))
        lent = [layer.weight for layer in layers if base_of(layer) is layer]
        waits = hoisted and len(lent) == len(layers) and self._may_wait(*lent, *biases)
        if apart and len({*rows}) != 1:
            raise Unsupported("layers of different widths where all blocks have the same")
        many, wide = ((len(rows),), rows[0]) if apart else ((), sum(rows))
        if self._input_major:
            stacked = self._place(lent, *many, inner, wide, waits=waits).mT
        else:
            stacked = self._place(lent, *many, wide, inner, waits=waits)
        views = stacked.unbind() if apart else stacked.split(rows)
        for layer, weight, view in zip(layers, weights, views, strict=True):
            self._fill(layer, view.view(*view.shape, *weight.shape[2:]), waits)
        if biases[0] is None:
            return Weights(stacked, None, waits)
        joined = self._place(biases, *many, wide, waits=waits)
        for bias, view in zip(
            biases, joined.unbind() if apart else joined.split(rows), strict=True
        ):
            self._lend(bias, view, waits)
        return Weights(stacked, joined, waits)

    def conv(self, layer: nn.Module, kernel: int = 3, stride: int = 1, padding: int = 1) -> Weights:
        """Borrow a square, zero-padded convolution without groups or dilation."""
        base = self._base(layer, nn.Conv2d)
        check_conv(base, kernel, stride, padding)
        self._check(base.weight)
        out, inner = base.weight.shape[:2]
        lent = [base.weight] if base_of(layer) is layer else []
        if self._input_major:
            weight = self._place(lent, kernel, kernel, inner, out).permute(3, 2, 0, 1)
        else:
            weight = self._place(lent, out, kernel, kernel, inner).permute(0, 3, 1, 2)
        self._fill(layer, weight)
        return Weights(weight, None if base.bias is None else self._keep(base.bias))

    def table(self, layer: nn.Module) -> Tensor:
        """Use an Embedding's rows in place."""
        rows = self.open(layer, nn.Embedding)
        if rows.max_norm is not None:
            raise Unsupported("an Embedding that shortens its rows (max_norm)")
        return self._keep(rows.weight)

    def norm(self, layer: nn.Module) -> Norm:
        """Use a GroupNorm's or LayerNorm's parameters in place."""
        parts = self.open(layer, nn.GroupNorm, nn.LayerNorm)
        if parts.weight is None or parts.bias is None:
            raise Unsupported(f"{kind(layer)} without weight and bias")
        weight, bias = self._keep(parts.weight), self._keep(parts.bias)
        groups = parts.num_groups if type(layer) is nn.GroupNorm else 0
        if not groups and parts.normalized_shape != tuple(weight.shape):
            raise Unsupported(f"a LayerNorm over {parts.normalized_shape}")
        return Norm(weight, bias, groups, parts.eps)

    def rms_norm(self, layer: nn.Module) -> tuple[Tensor | None, float]:
        """Use an RMSNorm of torch or diffusers in place: its weight, if any, and its eps."""
        parts = self.open(layer, "RMSNorm")
        if type(layer) is nn.RMSNorm:
            if parts.eps is None or parts.normalized_shape != getattr(parts.weight, "shape", None):
                raise Unsupported(f"an RMSNorm over {parts.normalized_shape}, or without an eps")
        elif parts.bias is not None:
            raise Unsupported("an RMSNorm with a bias")
        return None if parts.weight is None else self._keep(parts.weight), parts.eps

    def parameter(self, parameter: Tensor) -> Tensor:
        """Use a parameter that belongs to no layer in place."""
        return self._keep(parameter)

    def intact(self) -> bool:
        """Whether no parameter has moved and nothing that is watched has changed."""
        if self._looked_at or self._held:
            with self._moving, torch.inference_mode(self._mode), torch.no_grad():
                if self._looked_at:  # other code may hold any of them now
                    self._looked_at, self._held = False, [*self._lent.values()]
                    for lent in self._held:
                        lent.come_back()
                self._held = [lent for lent in self._held if lent.collect()]
        here = [*map(Tensor.data_ptr, self._parameters)] == self._addresses
        return here and self.unchanged()

    def seal(self) -> None:
        super().seal()
        self._held = [*self._lent.values()]
        self._parameters = [lent.parameter for lent in self._held]
        self._addresses = [lent.address for lent in self._held]
        if self._held:
            self._gate = Gate(self.modules, self._found, self._go_home)

    def _go_home(self, copied: bool = False) -> None:
        """Move parameters to their own memory before other code reads them, or copies them with
        their modules."""
        with self._moving, torch.inference_mode(self._mode), torch.no_grad():
            self._looked_at = True
            for lent in self._lent.values():
                if lent.strays or (copied and lent.waits):
                    lent.go_home()

    def refresh(self, scale: float = 1.0) -> None:
        """Bring the effective weights under LoRA adapters up to date, in place.

        Call it after the last weight is borrowed, and before each use. If nothing changed, it takes
        microseconds (on a GPU it waits for the queued work).

        Args:
            scale: multiplies every active adapter, as diffusers' LoRA `scale` does.

        Raises:
            Unsupported: an adapter has become one that the runtime cannot merge.
        """
        if self._merges.refresh(scale):
            self.epoch = next(EPOCHS)

    def end(self) -> None:
        """Give every parameter its own memory again, in its old layout."""
        if self._gate is not None:
            self._gate.leave()
        with self._moving, torch.inference_mode(self._mode), torch.no_grad():
            bring_home(self._root, self._lent.values())
            for lent in self._lent.values():
                lent.go_home()
            self._lent.clear()

    def width(self, layer: nn.Module) -> int:
        """The number of rows N of a linear layer's weight."""
        rows: int = self._base(layer, nn.Linear, nn.Conv2d).weight.shape[0]
        return rows

    def _base(self, layer: nn.Module, *known: type) -> Any:
        """Read a layer; of a LoRA layer, also the base layer."""
        base = base_of(layer)
        if base is not layer:
            self.open(layer, type(layer))
        return self.open(base, *known)

    def _may_wait(self, *weights: Tensor | None) -> bool:
        """Whether weights that only `hoist` reads wait in host memory; counts their bytes."""
        size = sum(weight.nbytes for weight in weights if weight is not None)
        self.hoisted, self.waiting = self.hoisted + size, self.waiting + size * self.offloads
        return self.offloads

    def _place(self, sources: list[Any], *shape: int, waits: bool = False) -> Tensor:
        """Memory for `sources`; large ones leave the GPU before it is allocated, not after."""
        if self._rehearsal:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        if waits:
            with torch.inference_mode(self._mode):
                return host_memory(shape, self.dtype)
        large = sum(source.nbytes for source in sources) > _LARGE and self.device.type != "cpu"
        try:
            for source in sources if large else ():
                source.data = source.detach().cpu()
            with torch.inference_mode(self._mode):
                memory = torch.empty(shape, dtype=self.dtype, device=self.device)
        except BaseException:
            for source in sources if large else ():
                source.data = source.detach().to(self.device)
            raise
        return memory

    def _fill(self, layer: Any, view: Tensor, waits: bool = False) -> None:
        """Make `view` a layer's weight: lend it, or under LoRA keep the effective weight there."""
        if base_of(layer) is layer:
            self._lend(layer.weight, view, waits)
        elif self._rehearsal:
            added_by(layer)
        else:
            self._merges.add(layer, view)

    def _lend(self, parameter: Tensor, view: Tensor, waits: bool = False) -> None:
        if self._rehearsal:
            return
        homes = self._homes.setdefault(id(parameter), [])
        with torch.inference_mode() if self._mode else torch.no_grad():
            self._lent[id(parameter)] = Lent(parameter, view, homes, waits)

    def _found(self, parameter: Tensor) -> Lent | None:
        """The lent parameter's record, if it is still where the loan put it."""
        lent = self._lent.get(id(parameter))
        return lent if lent is not None and parameter.data_ptr() == lent.address else None

    def _keep(self, parameter: Tensor) -> Tensor:
        """Use a parameter where it is."""
        self._check(parameter)
        if not parameter.is_contiguous():
            raise Unsupported("a bias, norm or embedding that is not contiguous")
        if not self._rehearsal:
            self._lent[id(parameter)] = Lent(parameter)
        return parameter.detach()

    def _check(self, *parameters: Tensor) -> None:
        for parameter in parameters:
            if type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
                name = f"{type(parameter).__module__}.{type(parameter).__qualname__}"
                raise Unsupported(
                    f"weights kept as {parameter.layout} {name}, not as plain numbers"
                )
            if parameter.device.type == "cpu" and parameter.untyped_storage().is_shared():
                raise Unsupported("weights in memory that other processes share")
            if parameter.is_inference() != self._mode:
                raise Unsupported("weights made partly in torch.inference_mode")
            if parameter.dtype != self.dtype or parameter.device != self.device:
                raise Unsupported(
                    f"weights of {parameter.dtype} on {parameter.device} beside {self.dtype} on"
                    f" {self.device}"
                )
        identities = {id(parameter) for parameter in parameters}
        if len(identities) < len(parameters) or identities & self._seen:
            raise Unsupported("a parameter that two layers share")
        self._seen |= identities
