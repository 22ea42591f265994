"""Weights lent, not copied: parameters become views into buffers laid out for the kernels.

A lent parameter keeps its identity, shape, values and name; only its memory moves. So `state_dict`,
`save_pretrained` and edits in place go on working, and the kernels see those edits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.kernels.dispatch import NATIVE, NATIVE_DTYPES

_LARGE = 32 << 20
"""Bytes of a stack whose sources wait on the host while it is made: SDXL's text projections are an
eighth of its weights, which must not be on a GPU twice."""

_READ = (
    "eps",
    "num_groups",
    "padding",
    "padding_mode",
    "stride",
    "heads",
    "processor",
    "output_scale_factor",
    "rescale_output_factor",
    "residual_connection",
    "time_embedding_norm",
    "skip_time_act",
    "flip_sin_to_cos",
    "downscale_freq_shift",
    "training",
    *("s1", "s2", "b1", "b2"),  # FreeU
)
"""Attributes of modules that a compact network depends on: each must stay the object it is."""

_ABSENT = ("forward", "_conv_forward", "s1")
"""Attributes that hooks, offloading, seamless tiling and FreeU would add to a module."""


class Unsupported(ValueError):
    """A module that this runtime does not compute; the message says what about it."""


@dataclass(frozen=True)
class Weights:
    """Linear layers [N, D], stacked along N, or a convolution [N, C, k, k]; and the bias [N]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Norm:
    """Affine parameters of a GroupNorm (`groups`) or a LayerNorm (`groups` 0)."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


@dataclass(frozen=True)
class _Lent:
    parameter: Tensor
    address: int
    stride: tuple[int, ...]
    """Before it was lent."""


class Loan:
    """The parameters of `root` that are lent to the runtime, and what must hold while they are.

    A rehearsal raises Unsupported where the loan would and moves nothing.
    """

    def __init__(self, root: nn.Module, rehearsal: bool = False) -> None:
        self._rehearsal = rehearsal
        self._lent: dict[int, _Lent] = {}
        modules = list(root.modules())
        drops = [m for m in modules if isinstance(m, nn.Dropout) and m.p > 0]
        if any(module.training for module in (root, *drops)):
            raise Unsupported("a module in training mode")
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        if self.hooked() or any({"forward", "_conv_forward"} & vars(m).keys() for m in modules):
            raise Unsupported("a hook that wraps one of its modules")
        self._watch = _watch(modules)
        first = next(root.parameters())
        self.dtype, self.device = first.dtype, first.device
        # our CPU loop wants a row per input channel; GPU libraries a row per output channel
        self._input_major = (
            self.device.type == "cpu" and NATIVE is not None and self.dtype in NATIVE_DTYPES
        )

    def linear(self, *layers: nn.Module) -> Weights:
        """Lend linear layers (or 1×1 convolutions) of equal input width, stacked along N."""
        for layer in layers:
            if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1):
                _check_conv(layer, kernel=1, stride=1, padding=0)
            elif type(layer) is not nn.Linear:
                raise Unsupported(f"a {kind(layer)} where a Linear was expected")
        weights: list[Any] = [layer.weight for layer in layers]
        rows, inner = [w.shape[0] for w in weights], weights[0].shape[1]
        if any(w.shape[1] != inner for w in weights):
            raise Unsupported("layers of different input widths that read the same input")
        biases: list[Any] = [layer.bias for layer in layers]
        if len({bias is None for bias in biases}) > 1:
            raise Unsupported("layers with and without a bias side by side")
        self._check(*weights, *(bias for bias in biases if bias is not None))
        if self._input_major:
            stacked = self._place(weights, inner, sum(rows)).t()
        else:
            stacked = self._place(weights, sum(rows), inner)
        for parameter, view in zip(weights, stacked.split(rows), strict=True):
            self._lend(parameter, view.view(*view.shape, *parameter.shape[2:]))
        if biases[0] is None:
            return Weights(stacked, None)
        joined = self._place(biases, sum(rows))
        for parameter, view in zip(biases, joined.split(rows), strict=True):
            self._lend(parameter, view)
        return Weights(stacked, joined)

    def conv(self, layer: nn.Module, kernel: int = 3, stride: int = 1, padding: int = 1) -> Weights:
        """Lend a square, zero-padded convolution without groups or dilation."""
        if type(layer) is not nn.Conv2d:
            raise Unsupported(f"a {kind(layer)} where a Conv2d was expected")
        _check_conv(layer, kernel, stride, padding)
        self._check(layer.weight)
        out, inner = layer.weight.shape[:2]
        if self._input_major:
            memory = self._place([layer.weight], kernel, kernel, inner, out).permute(3, 2, 0, 1)
        else:
            memory = self._place([layer.weight], out, kernel, kernel, inner).permute(0, 3, 1, 2)
        self._lend(layer.weight, memory)
        if layer.bias is not None:
            self._keep(layer.bias)
        return Weights(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def norm(self, layer: nn.Module) -> Norm:
        """Use a GroupNorm or LayerNorm where its parameters are."""
        if type(layer) not in (nn.GroupNorm, nn.LayerNorm):
            raise Unsupported(f"a {kind(layer)} where a GroupNorm or LayerNorm was expected")
        parts: Any = layer
        if parts.weight is None or parts.bias is None:
            raise Unsupported(f"{kind(layer)} without weight and bias")
        self._keep(parts.weight)
        self._keep(parts.bias)
        groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else 0
        return Norm(parts.weight.detach(), parts.bias.detach(), groups, parts.eps)

    def intact(self) -> bool:
        """Whether every parameter is still where it was lent and nothing watched was replaced."""
        return bool(self._watch.intact()) and all(
            lent.parameter.data_ptr() == lent.address for lent in self._lent.values()
        )

    def hooked(self) -> bool:
        """Whether a forward hook would be passed over."""
        return any(self._hooks)

    def end(self) -> None:
        """Give every parameter memory of its own again, laid out as before; values stay as now."""
        for lent in self._lent.values():
            parameter = lent.parameter
            if parameter.data_ptr() == lent.address:  # else somebody else has moved it meanwhile
                own = torch.empty_strided(
                    parameter.shape, lent.stride, dtype=parameter.dtype, device=parameter.device
                )
                parameter.data = own.copy_(parameter.detach())
        self._lent.clear()

    def _place(self, sources: list[Any], *shape: int) -> Tensor:
        """Memory for `sources`; large ones leave the GPU before it comes, not after."""
        if self._rehearsal:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        strides = [source.stride() for source in sources]
        large = sum(source.nbytes for source in sources) > _LARGE and self.device.type != "cpu"
        try:
            for source in sources if large else ():
                source.data = source.detach().cpu()
            memory = torch.empty(shape, dtype=self.dtype, device=self.device)
        except BaseException:
            for source in sources if large else ():
                source.data = source.detach().to(self.device)
            raise
        for source, stride in zip(sources, strides, strict=True):
            self._lent[id(source)] = _Lent(source, 0, _dense(source, stride))
        return memory

    def _lend(self, parameter: Tensor, view: Tensor) -> None:
        if self._rehearsal:
            self._lent[id(parameter)] = _Lent(parameter, 0, ())
            return
        view.copy_(parameter.detach())
        parameter.data = view
        stride = self._lent[id(parameter)].stride
        self._lent[id(parameter)] = _Lent(parameter, parameter.data_ptr(), stride)

    def _keep(self, parameter: Tensor) -> None:
        """Use a parameter where it is."""
        self._check(parameter)
        if not parameter.is_contiguous():
            raise Unsupported("a strided bias or norm")
        self._lent[id(parameter)] = _Lent(parameter, parameter.data_ptr(), parameter.stride())

    def _check(self, *parameters: Tensor) -> None:
        for parameter in parameters:
            if parameter.dtype != self.dtype or parameter.device != self.device:
                raise Unsupported(
                    f"weights of {parameter.dtype} on {parameter.device} beside {self.dtype} on"
                    f" {self.device}"
                )
        identities = {id(parameter) for parameter in parameters}
        if len(identities) < len(parameters) or identities & self._lent.keys():
            raise Unsupported("a parameter that two layers share")


def kind(thing: Any) -> str:
    """Class name, with its package unless that is torch or diffusers: others reuse the names."""
    package = type(thing).__module__.split(".")[0]
    name = type(thing).__name__
    return name if package in ("torch", "diffusers") else f"{package} {name}"


def _check_conv(layer: nn.Conv2d, kernel: int, stride: int, padding: int) -> None:
    if (
        layer.kernel_size != (kernel, kernel)
        or layer.stride != (stride, stride)
        or layer.padding != (padding, padding)
        or layer.padding_mode != "zeros"
        or layer.groups != 1
        or layer.dilation != (1, 1)
    ):
        raise Unsupported(
            f"{layer} where a plain {kernel}×{kernel} convolution of stride {stride} and padding"
            f" {padding} was expected"
        )


def _dense(parameter: Tensor, stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides to go back to: the former ones, or plain ones where those left gaps."""
    former = torch.empty_strided(parameter.shape, stride, device="meta")
    last = former.ndim == 4 and former.is_contiguous(memory_format=torch.channels_last)
    plain = torch.empty(parameter.shape, device="meta").stride()
    return stride if last or former.is_contiguous() else plain


class _SlowWatch:
    """`fastdiff._C.Watch` where it was not built."""

    def __init__(self, items: list[Any], objects: list[Any], dicts: list[Any]) -> None:
        self._items, self._dicts = items, [(names, len(names)) for names in dicts]
        self._types = [(thing, type(thing)) for thing in objects]

    def intact(self) -> bool:
        return (
            all(names.get(key) is value for names, key, value in self._items)
            and all(type(thing) is known for thing, known in self._types)
            and all(len(names) == count for names, count in self._dicts)
        )


def _watch(modules: list[nn.Module]) -> Any:
    """Note children, parameters and what is read of each module, and its class."""
    items: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules:
        names = vars(module)
        items += [(names, name, names.get(name)) for name in _READ if name in names]
        items += [(names, name, None) for name in _ABSENT if name not in names]
        for kept in (module._modules, module._parameters):
            items += [(kept, name, value) for name, value in kept.items()]
    dicts = [kept for module in modules for kept in (module._modules, module._parameters)]
    return (_SlowWatch if NATIVE is None else NATIVE.Watch)(items, modules, dicts)
