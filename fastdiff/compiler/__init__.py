"""`fastdiff.compile`, `fastdiff.restore` and `fastdiff.report`."""

from dataclasses import dataclass
from typing import Any, TypeVar

from fastdiff.compiler.options import FASTDIFF, LOOP, Options, chosen
from fastdiff.compiler.slot import Slot, slot_of
from fastdiff.errors import UserError

__all__ = ["Options", "Report", "compile", "report", "restore"]

T = TypeVar("T")


def compile(target: T, options: Options | None = None, **keywords: Any) -> T:
    """Make a pipeline or model fast, in place, without changing what it draws.

    Its networks run as compact networks on the same weights. The target stays the object and class
    it was: `save_pretrained`, `state_dict`, schedulers, callbacks and LoRA loading work as before.
    Where a call cannot be honoured it runs eagerly, with one warning, and `report` lists it.

    Args:
        target: a Stable Diffusion pipeline (see `compiler.adapters.PIPELINES`), a bare
            UNet2DConditionModel or AutoencoderKL, on any device, in any dtype.
        options: see `Options`.
        keywords: the same by name, as `backend="ort"`.

    Returns:
        `target` itself. Compiling it again changes nothing.

    Raises:
        ValueError: the target or an option is not known, `ignore` names no part of the target,
            nothing in it can be made fast, or the backend asked for cannot run; the message says
            why.
    """
    options = chosen(options, keywords)
    parts = _left(target, options)
    _refuse_compiled(parts)
    parts = _with_engine(target, parts, options)
    from fastdiff.compiler.pipelines import take_loop

    slots = [
        Slot(name, module, kind)
        for name, (module, kind) in parts.items()
        if slot_of(module) is None
    ]
    for slot in slots:
        slot.take()
        if slot.refused and slot.kind.runner != FASTDIFF:
            raise UserError(f"{slot.name} cannot run on {slot.kind.runner}: {slot.refused}")
    if slots and all(slot.refused for slot in slots):
        reasons = "; ".join(f"{slot.name}: {slot.refused}" for slot in slots)
        raise UserError(f"nothing in this {type(target).__name__} can be made fast: {reasons}")
    for slot in slots:
        slot.module._compiled_call_impl = slot
    if not {"unet", LOOP} & set(options.ignore):
        take_loop(target)
    return target


def restore(target: T) -> T:
    """Undo `compile`: eager calls, and parameters in contiguous memory of their own.

    A model that several pipelines share is eager in all of them afterwards. Restore before moving
    a pipeline away for good: what the kernels' layout needs is given back at the next call only.

    Returns:
        `target` itself; eager outputs are bit for bit what they were before `compile`.
    """
    parts = _parts(target)
    from fastdiff.compiler.pipelines import release_loop

    for module, _ in parts.values():
        slot = slot_of(module)
        if slot is not None:
            del module._compiled_call_impl
            slot.end()
    release_loop(target)
    return target


@dataclass(frozen=True)
class Part:
    """One part of a pipeline: who runs it, and why it is not fastdiff where it is not."""

    name: str
    runs: str
    """"fastdiff" or another backend's name, "eager" (it would, but something stands in the way) or
    "diffusers"."""
    why: str


@dataclass(frozen=True)
class Report:
    """What runs fast and what does not; `str(report)` is a table."""

    parts: tuple[Part, ...]
    note: str | None = None
    """What makes all of them slower than they need be."""

    def __str__(self) -> str:
        name = max(len(part.name) for part in self.parts)
        runs = max(len(part.runs) for part in self.parts)
        lines = (f"{p.name:{name}}  {p.runs:{runs}}  {p.why}".rstrip() for p in self.parts)
        return "\n".join([*lines, self.note] if self.note else lines)


def report(target: Any) -> Report:
    """List what runs on fastdiff, what runs eagerly, and why."""
    parts = _parts(target)
    from fastdiff.compiler.adapters import eager_parts
    from fastdiff.compiler.pipelines import Loop, loop_of

    def loop_part(loop: Loop | None) -> Part:
        if loop is None:
            return Part(LOOP, "diffusers", "a few numbers per step")
        notes = [f"{count} ran in diffusers' own loop: {why}" for why, count in loop.own.items()]
        return Part(LOOP, "fastdiff", "; ".join([f"{loop.planned} loops", *notes]))

    ours = [_part(name, slot_of(module)) for name, (module, _) in parts.items()]
    if hasattr(target, "scheduler"):
        ours.append(loop_part(loop_of(target)))
    theirs = [Part(name, "diffusers", why) for name, why in eager_parts(target).items()]
    return Report((*ours, *theirs), _note(parts))


def _note(parts: dict[str, Any]) -> str | None:
    from fastdiff.kernels import dispatch

    weights = (next(module.parameters(), None) for module, _ in parts.values())
    on_cpu = any(weight is not None and weight.device.type == "cpu" for weight in weights)
    return dispatch.NOT_BUILT if on_cpu and dispatch.NATIVE is None else None


def _part(name: str, slot: Slot | None) -> Part:
    if slot is None:
        return Part(name, "eager", "not compiled")
    notes = [f"{count} calls ran eagerly: {why}" for why, count in slot.eager.items()]
    notes += [f"float32 since float16 overflowed in {where}" for where in slot.promoted]
    if slot.refused is not None:
        return Part(name, "eager", "; ".join([slot.refused, *notes]))
    return Part(name, slot.kind.runner, "; ".join([f"{slot.fast} calls", *notes]))


def _refuse_compiled(parts: dict[str, Any]) -> None:
    for name, (module, _) in parts.items():
        if slot_of(module) is None and vars(module).get("_compiled_call_impl") is not None:
            raise UserError(
                f"{name} was compiled with torch.compile already; build the pipeline anew and"
                " compile it with fastdiff alone"
            )


def _with_engine(target: Any, parts: dict[str, Any], options: Options) -> dict[str, Any]:
    """`parts` with the U-Net on the backend that `options` ask for."""
    for name, (module, _) in parts.items():
        slot, wanted = slot_of(module), options.backend if name == "unet" else FASTDIFF
        other = options.engines is not None or options.ort_graphs
        if slot is not None and (slot.kind.runner != wanted or (name == "unet" and other)):
            raise UserError(f"{name} runs on {slot.kind.runner} already; restore it first")
    if options.backend == FASTDIFF:
        return parts
    if "unet" not in parts:
        raise UserError(f"the backend {options.backend} computes a U-Net, and there is none")
    for name in ("controlnet", "adapter"):
        if getattr(target, name, None) is not None:
            raise UserError(
                f"the backend {options.backend} takes no residuals, which the {name} of"
                f" {type(target).__name__} gives the U-Net; compile it without a backend"
            )
    from fastdiff.compiler.adapters import kind_of_engine

    module, kind = parts["unet"]
    if slot_of(module) is None:
        kind = kind_of_engine(module, options)
    return parts | {"unet": (module, kind)}


def _left(target: Any, options: Options) -> dict[str, Any]:
    """The parts of `target` that `options` do not ignore."""
    found = _parts(target)
    if options.ignore:
        reported = {part.name for part in report(target).parts}
        names = reported | {name.split(".")[0] for name in reported}
        if unknown := set(options.ignore) - names:
            raise UserError(
                f"Options.ignore names {min(unknown)!r}; {type(target).__name__} has"
                f" {', '.join(sorted(names))}"
            )
    ignored = set(options.ignore)
    return {n: part for n, part in found.items() if not ignored & {n, n.split(".")[0]}}


def _parts(target: Any) -> dict[str, Any]:
    try:
        from fastdiff.compiler.adapters import parts
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"fastdiff.compile needs {missing.name}: pip install 'fastdiff[diffusers]'"
        ) from missing
    try:
        return parts(target)
    except ValueError as unknown:
        raise UserError(str(unknown)) from None
