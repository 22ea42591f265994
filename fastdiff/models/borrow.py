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


class Loan:
    """The parameters of `root` that are lent to the runtime, and what must hold while they are.

    A rehearsal raises Unsupported where the loan would and moves nothing.
    """

    def __init__(self, root: nn.Module, rehearsal: bool = False) -> None:
        self._rehearsal = rehearsal
        self._lent: list[tuple[Tensor, int]] = []
        self._watched: list[tuple[dict[str, Any], str, Any]] = []
        self._homes = {
            id(child): (parent._modules, name)
            for parent in root.modules()
            for name, child in parent._modules.items()
            if child is not None
        }
        modules = list(root.modules())
        self._dicts = [module.__dict__ for module in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        first = next(root.parameters())
        self.dtype, self.device = first.dtype, first.device
        # our CPU loop wants a row per input channel; GPU libraries a row per output channel
        self._input_major = (
            self.device.type == "cpu" and NATIVE is not None and self.dtype in NATIVE_DTYPES
        )

    def linear(self, *layers: nn.Module) -> Weights:
        """Lend linear layers (or 1×1 convolutions) of equal input width, stacked along N."""
        for layer in layers:
            pointwise = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1)
            if type(layer) is not nn.Linear and not pointwise:
                raise Unsupported(f"a {_name(layer)} where a Linear was expected")
        weights: list[Any] = [layer.weight for layer in layers]
        rows, inner = [w.shape[0] for w in weights], weights[0].shape[1]
        large = sum(parameter.nbytes for parameter in weights) > _LARGE
        for parameter in weights:
            self._check(parameter)
            if large and not self._rehearsal:
                parameter.data = parameter.detach().cpu()  # leaves the GPU before the stack comes
        if self._input_major:
            stacked = self._empty(inner, sum(rows)).t()
        else:
            stacked = self._empty(sum(rows), inner)
        for layer, parameter, view in zip(layers, weights, stacked.split(rows), strict=True):
            self._lend(layer, "weight", parameter, view.view(*view.shape, *parameter.shape[2:]))
        biases: list[Any] = [layer.bias for layer in layers]
        if all(bias is None for bias in biases):
            return Weights(stacked, None)
        if any(bias is None for bias in biases):
            raise Unsupported("layers with and without a bias side by side")
        joined = self._empty(sum(rows))
        for layer, parameter, view in zip(layers, biases, joined.split(rows), strict=True):
            self._lend(layer, "bias", parameter, view)
        return Weights(stacked, joined)

    def conv(self, layer: nn.Module) -> Weights:
        """Lend a square convolution without groups or dilation."""
        if type(layer) is not nn.Conv2d:
            raise Unsupported(f"a {_name(layer)} where a Conv2d was expected")
        height, width = layer.kernel_size
        if height != width or layer.groups != 1 or layer.dilation != (1, 1):
            raise Unsupported(f"{layer}: only square windows without groups or dilation")
        out, inner = layer.weight.shape[:2]
        if self._input_major:
            memory = self._empty(height, width, inner, out).permute(3, 2, 0, 1)
        else:
            memory = self._empty(out, height, width, inner).permute(0, 3, 1, 2)
        self._check(layer.weight)
        self._lend(layer, "weight", layer.weight, memory)
        if layer.bias is not None:
            self._keep(layer, "bias", layer.bias)
        return Weights(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def norm(self, layer: nn.Module) -> Norm:
        """Use a GroupNorm or LayerNorm where its parameters are."""
        if type(layer) not in (nn.GroupNorm, nn.LayerNorm):
            raise Unsupported(f"a {_name(layer)} where a GroupNorm or LayerNorm was expected")
        parts: Any = layer
        if parts.weight is None or parts.bias is None:
            raise Unsupported(f"{type(layer).__name__} without weight and bias")
        self._keep(layer, "weight", parts.weight)
        self._keep(layer, "bias", parts.bias)
        groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else 0
        return Norm(parts.weight.detach(), parts.bias.detach(), groups, parts.eps)

    def watch(self, module: nn.Module, name: str) -> None:
        """Note an attribute that must stay the object it is now (None where there is none)."""
        place = module._modules if name in module._modules else module.__dict__
        self._watched.append((place, name, place.get(name)))

    def intact(self) -> bool:
        """Whether every parameter is still where it was lent and nothing watched was replaced."""
        return all(place.get(name) is value for place, name, value in self._watched) and all(
            parameter.data_ptr() == address for parameter, address in self._lent
        )

    def hooked(self) -> bool:
        """Whether something wraps a call that the compact network would pass over."""
        return any(self._hooks) or any("forward" in names for names in self._dicts)

    def end(self) -> None:
        """Give every parameter contiguous memory of its own again; values stay as they are now."""
        for parameter, address in self._lent:
            if parameter.data_ptr() == address:  # else somebody else has moved it meanwhile
                parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._lent.clear()
        self._watched.clear()

    def _empty(self, *shape: int) -> Tensor:
        device = "meta" if self._rehearsal else self.device
        return torch.empty(shape, dtype=self.dtype, device=device)

    def _lend(self, layer: nn.Module, name: str, parameter: Tensor, view: Tensor) -> None:
        if self._rehearsal:
            return
        view.copy_(parameter.detach())
        parameter.data = view
        self._keep(layer, name, parameter)

    def _check(self, parameter: Tensor) -> None:
        if parameter.dtype != self.dtype or parameter.device != self.device:
            raise Unsupported(
                f"weights of {parameter.dtype} on {parameter.device} beside {self.dtype} on"
                f" {self.device}"
            )

    def _keep(self, layer: nn.Module, name: str, parameter: Tensor) -> None:
        self._check(parameter)
        self._lent.append((parameter, parameter.data_ptr()))
        self._watched.append((layer._parameters, name, parameter))
        home = self._homes.get(id(layer))
        if home is not None and name == "weight":
            self._watched.append((*home, layer))


def _name(layer: nn.Module) -> str:
    """With its package where that is not torch: a LoRA's layer is called Linear, too."""
    kind = type(layer)
    package = kind.__module__.split(".")[0]
    return kind.__name__ if package == "torch" else f"{package} {kind.__name__}"
