"""Apply `Options` to the parts of a target."""

from typing import Any

from fastdiff.compiler.options import FASTDIFF, Options
from fastdiff.compiler.parts import denoiser_name, in_strips, networks, without_tactics
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.families import Taken


def configured(target: Any, parts: Taken, options: Options) -> Taken:
    """`parts` of a target, changed as `options` say.

    Raises UserError if one of them is already compiled with other options, or if the chosen backend
    cannot run.
    """
    return _with_engine(target, _with_tiling(_with_tactics(parts, options), options), options)


def _with_tiling(parts: Taken, options: Options) -> Taken:
    """`parts` with a decoder that works in strips, if `options` choose that."""
    exact = options.vae_tiling == "exact"
    if exact and not any(kind.cuts is not None for _, kind in parts.values()):
        raise UserError('Options.vae_tiling is "exact", but there is no autoencoder')
    for name, (module, kind) in parts.items():
        slot = slot_of(module)
        if slot is not None and kind.cuts is not None and slot.kind.cuts != exact:
            raise UserError(f"{name} is compiled with another vae_tiling already; restore it first")
    return {n: (m, in_strips(kind) if exact else kind) for n, (m, kind) in parts.items()}


def _with_tactics(parts: Taken, options: Options) -> Taken:
    """`parts` with cuDNN's plans searched or not, as `options` say."""
    for name, (module, _) in parts.items():
        slot = slot_of(module)
        if slot is not None and slot.kind.tactics != options.tactics:
            raise UserError(f"{name} is compiled with other tactics already; restore it first")
    if options.tactics:
        return parts
    return {name: (module, without_tactics(kind)) for name, (module, kind) in parts.items()}


def _with_engine(target: Any, parts: Taken, options: Options) -> Taken:
    """`parts` with the network that the loop repeats on the backend that `options` choose."""
    own = denoiser_name(target)
    for name, (module, _) in parts.items():
        slot, wanted = slot_of(module), options.backend if name == own else FASTDIFF
        other = options.engines is not None or options.ort_graphs
        if slot is not None and (slot.kind.runner != wanted or (name == own and other)):
            raise UserError(f"{name} runs on {slot.kind.runner} already; restore it first")
    if options.backend == FASTDIFF:
        return parts
    denoised = networks(target)[own].denoised
    if own not in parts or denoised is None:
        raise UserError(
            f"the backend {options.backend} computes only a denoising network, and there is"
            " none here"
        )
    for name in denoised.beside:
        if getattr(target, name, None) is not None:
            raise UserError(
                f"the backend {options.backend} takes no residuals, which the {name} of"
                f" {type(target).__name__} gives the {own}; compile it without a backend"
            )
    from fastdiff.compiler.engines import kind_of_engine

    module, kind = parts[own]
    if slot_of(module) is None:
        kind = kind_of_engine(own, module, kind, denoised, options)
    return parts | {own: (module, kind)}
