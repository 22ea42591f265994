"""PEFT's LoRA layers: their effective weight, and whether it is still up to date.

LoRA layers are recognised by class name; peft is not imported. A LoRA layer holds its base layer
(`base_layer`) and, by adapter name, `lora_A` [r, D], `lora_B` [N, r] and `scaling`. Plain LoRA
computes (W + Σ scaling·B·A)·x, and the runtime multiplies by this sum. W stays where it is, and the
sum is always computed from W, so an adapter that is removed leaves no trace.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.watch import Unsupported, Unwritten, hooks, version, watch

_LAYERS = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.layer", "Conv2d")}
_WINDOW = ("stride", "padding", "dilation", "padding_mode", "groups")
_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""Attributes of a LoRA layer that select its active adapters."""


def is_lora(layer: Any) -> bool:
    """Whether `layer` is PEFT's LoRA layer for a Linear or a Conv2d."""
    return (type(layer).__module__, type(layer).__name__) in _LAYERS


def base_of(layer: Any) -> Any:
    """The base layer of a LoRA layer; any other layer itself."""
    return layer.base_layer if is_lora(layer) else layer


def without_adapters(root: nn.Module) -> list[nn.Module]:
    """The modules of `root`, without those that hold the adapters of LoRA layers."""
    adapters = {
        id(module)
        for layer in root.modules()
        if is_lora(layer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for module in child.modules()
    }
    return [module for module in root.modules() if id(module) not in adapters]


@dataclass(frozen=True)
class _Part:
    """scaling·B·A of one adapter, with the modules that hold B (`up`) and A (`down`)."""

    name: str
    down: Any
    up: Any
    dropout: nn.Module
    scaling: Any
    """A float; or a tensor [], if hotswapping was prepared, which stays on the CPU if it was
    there."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        scaling = (self.scaling,) if isinstance(self.scaling, Tensor) else ()
        return self.down.weight, self.up.weight, *scaling


def added_by(layer: Any) -> list[_Part]:
    """What adapters now add to a LoRA layer's weight, chosen as in PEFT's own forward.

    Raises:
        Unsupported: an adapter does something other than add scaling·B·A.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return []
    names = layer._active_adapter
    names = [names] if isinstance(names, str) else names
    return [_part(layer, name) for name in names if name in layer.lora_A]


def _part(layer: Any, name: str) -> _Part:
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    down, up = layer.lora_A[name], layer.lora_B[name]
    part = _Part(name, down, up, dropout, layer.scaling[name])
    if name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(name):
        raise Unsupported(f"the adapter {name!r}, which is not plain LoRA (DoRA or the like)")
    if type(down) is not type(base) or type(up) is not type(base):
        raise Unsupported(f"the adapter {name!r}, whose layers do not fit a {type(base).__name__}")
    if down.bias is not None or up.bias is not None:
        raise Unsupported(f"the adapter {name!r} with a bias of its own (lora_bias)")
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
        raise Unsupported(f"the adapter {name!r} with dropout in training mode; call eval()")
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        raise Unsupported(f"the adapter {name!r} with a {type(dropout).__name__} for dropout")
    window = _WINDOW if isinstance(base, nn.Conv2d) else ()
    rows, rank = up.weight.flatten(1).shape
    if (
        any(getattr(down, key) != getattr(base, key) for key in window)
        or (rank, *base.weight.shape[1:]) != down.weight.shape
        or rows != base.weight.shape[0]
    ):
        raise Unsupported(f"the adapter {name!r}, whose shape differs from its layer's")
    for tensor in (down.weight, up.weight):
        if tensor.device != base.weight.device or not tensor.is_floating_point():
            raise Unsupported(f"the adapter {name!r} of {tensor.dtype} on {tensor.device}")
    hooks((down, up, dropout))
    return part


def _write(out: Tensor, base: Tensor, added: list[_Part], scale: float) -> None:
    """out = base + scale·Σ scaling·B·A, summed in float32 or wider, rounded once."""
    exact = torch.promote_types(base.dtype, torch.float32)
    total = base.flatten(1).to(exact, copy=True)
    for part in added:
        up, down = (weight.to(exact).flatten(1) for weight in (part.up.weight, part.down.weight))
        total.addmm_(up * (part.scaling if scale == 1 else part.scaling * scale), down)
    out.copy_(total.view(base.shape))


class Merges:
    """Effective weights of LoRA layers in the runtime's memory, rewritten in place on a change."""

    def __init__(self) -> None:
        self._layers: list[tuple[Any, Tensor]] = []
        self._recipes: list[Any] = []
        self._noted: _Noted | None = None
        self._scale = 1.0

    def add(self, layer: nn.Module, out: Tensor) -> None:
        """Have `refresh` write the layer's effective weight into `out`, of the same shape."""
        self._layers.append((layer, out))
        self._recipes.append(None)
        self._noted = None

    def refresh(self, scale: float = 1.0) -> bool:
        """Bring every `out` up to date, with all adapters times `scale`; returns whether any was
        rewritten.

        Raises:
            Unsupported: an adapter has become one that the runtime cannot merge.
        """
        if self._noted is not None and scale == self._scale and self._noted.holds():
            return False
        inference = any(out.is_inference() for _, out in self._layers)
        with torch.inference_mode(inference), torch.no_grad():
            return self._rewrite(scale)

    def _rewrite(self, scale: float) -> bool:
        unseen = self._noted is not None and not self._noted.tensors.values_hold()
        added, rewritten = [], False
        for i, (layer, out) in enumerate(self._layers):
            if layer._disable_adapters and layer.merged_adapters:
                layer.unmerge()  # PEFT's own forward does this, too
            base = layer.base_layer.weight
            if base.dtype != out.dtype or base.device != out.device:
                raise Unsupported(f"weights that moved to {base.dtype} on {base.device}")
            added.append(added_by(layer))
            recipe = (*layer.merged_adapters, *_recipe(base, added[-1], scale))
            if unseen or recipe != self._recipes[i]:
                self._recipes[i] = None
                _write(out, base, added[-1], scale)
                self._recipes[i], rewritten = recipe, True
        layers = [layer for layer, _ in self._layers]
        self._scale, self._noted = scale, _note(layers, added)
        return rewritten


def _recipe(base: Tensor, added: list[_Part], scale: float) -> tuple[Any, ...]:
    """A value that is equal as long as the tensors and numbers are the same; see `_Noted`."""
    tensors = [base, *(tensor for part in added for tensor in part.tensors)]
    scalings = [p.scaling for p in added if not isinstance(p.scaling, Tensor)]
    return (
        *((id(tensor), tensor.data_ptr(), version(tensor)) for tensor in tensors),
        *(scalings + [scale] if added else ()),
    )


@dataclass(frozen=True)
class _Noted:
    """The inputs of the effective weights, and cheap checks whether they have changed."""

    watch: Any
    names: list[tuple[list[str], tuple[str, ...]]]
    """Lists of adapter names, which may be edited in place, with their former contents."""
    tensors: Unwritten

    def holds(self) -> bool:
        return (
            self.watch.intact()
            and all(tuple(names) == before for names, before in self.names)
            and self.tensors.hold()
        )


def _note(layers: list[Any], added: list[list[_Part]]) -> _Noted:
    items: list[tuple[dict[str, Any], str, Any]] = []
    dicts: list[dict[Any, Any]] = []
    tensors: list[Tensor] = []
    modules: list[nn.Module] = []
    for layer, layer_parts in zip(layers, added, strict=True):
        items += [(vars(layer), key, vars(layer).get(key)) for key in _STATE]
        dicts.append(layer.lora_A._modules)  # an adapter may be active before it is added
        tensors.append(layer.base_layer.weight)
        for part in layer_parts:
            items.append((layer.scaling, part.name, part.scaling))
            for held, module in ((layer.lora_A, part.down), (layer.lora_B, part.up)):
                items.append((held._modules, part.name, module))
                items.append((vars(module), "forward", None))
                dicts += hooks([module])
                modules.append(module)
            if isinstance(part.dropout, nn.Dropout):
                names = vars(part.dropout)
                items += [(names, key, names[key]) for key in ("p", "training")]
            tensors += part.tensors
    return _Noted(
        watch(modules, items, dicts),
        [(names, tuple(names)) for names in _name_lists(layers)],
        Unwritten(tensors),
    )


def _name_lists(layers: list[Any]) -> Iterator[list[str]]:
    """Every list of adapter names, once: layers often share one."""
    found = {
        id(names): names
        for layer in layers
        for names in (layer._active_adapter, layer.merged_adapters)
    }
    return (names for names in found.values() if isinstance(names, list))
