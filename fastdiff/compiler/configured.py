"""Apply `Options` to the parts of a target."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastdiff.compiler.options import FASTDIFF, LOOP, Options
from fastdiff.compiler.parts import denoiser_name, in_strips, networks, without_tactics
from fastdiff.compiler.slot import Slot, slot_of
from fastdiff.errors import UserError
from fastdiff.families import Taken
from fastdiff.recipes import Recipe, recipe_of


def configured(target: Any, parts: Taken, options: Options) -> Taken:
    """`parts` of a target, changed as `options` say.

    Raises UserError if one of them is already compiled with other options, or if the chosen backend
    cannot run.
    """
    parts = _with_offload(target, _with_tiling(_with_tactics(parts, options), options), options)
    return _with_engine(target, parts, options)


def _with_offload(target: Any, parts: Taken, options: Options) -> Taken:
    """`parts` with networks whose weights wait in host memory, if `options` choose that: those that
    the target's plans repeat, and their ControlNets."""
    asked, plans = options.offload_hoisted, (recipe_of(target) or Recipe()).plans
    repeated = {plan.network for plan in plans} & parts.keys()
    beside = {plan.controls for plan in plans if plan.controls}
    planned = repeated | {name for name in parts if name.partition(".")[0] in beside}
    if asked and (not repeated or LOOP in options.ignore):
        raise UserError(
            "Options.offload_hoisted needs a pipeline whose loop runs as a plan; the loop of"
            f" {type(target).__name__} would copy the weights in every step"
        )
    for name in planned:
        slot = slot_of(parts[name][0])
        if slot is not None and slot.kind.offload != asked:
            raise UserError(
                f"{name} is compiled with another offload_hoisted already; restore it first"
            )
    moved = {n: (parts[n][0], replace(parts[n][1], offload=True)) for n in planned if asked}
    return parts | moved


def without_waiting(slots: Sequence[Slot], options: Options) -> str | None:
    """Why `options.offload_hoisted` cannot be used, if no network of `slots` has weights that
    only the start of a picture needs."""
    loans = [slot.loan for slot in slots if slot.kind.offload and slot.loan is not None]
    if not options.offload_hoisted or not loans or any(loan.hoisted for loan in loans):
        return None
    return "Options.offload_hoisted: every step needs all weights of this pipeline's networks"


def _with_tiling(parts: Taken, options: Options) -> Taken:
    """`parts` with a decoder that works in strips, if `options` choose that."""
    exact = options.vae_tiling == "exact"
    if exact and not any(kind.cuts is not None for _, kind in parts.values()):
        raise UserError(
            'Options.vae_tiling is "exact", but there is no autoencoder here; leave it out'
        )
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
