"""`fastdiff.compile`, `fastdiff.restore` and `fastdiff.report`."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack

from torch import nn

from fastdiff import installed
from fastdiff.compiler.options import FASTDIFF, LOOP, Keywords, Options, chosen
from fastdiff.compiler.slot import Slot, kept_slot, slot_of, waiting_notes
from fastdiff.compiler.taken import forget, remember, remembered, torch_compiled
from fastdiff.errors import UserError
from fastdiff.families import plain
from fastdiff.tables import plural

__all__ = ["Options", "Report", "compile", "report", "restore"]

T = TypeVar("T")


def compile(target: T, options: Options | None = None, **keywords: Unpack[Keywords]) -> T:
    """Make a pipeline or model fast, in place, without changing what it draws.

    Its networks run as compact networks on the same weights. The target keeps its identity and
    class: `save_pretrained`, `state_dict`, schedulers, callbacks and LoRA loading work as before.
    A call that fastdiff does not support runs eagerly, with one warning, and `report` lists it.

    Args:
        target: a diffusers pipeline (see `fastdiff.recipes`), or one of its networks alone, on any
            device, in any dtype.
        options: see `Options`.
        keywords: the same options by name, such as `backend="ort"`.

    Returns:
        `target` itself. Compiling it again changes nothing.

    Raises:
        ValueError: the target or an option is unknown, `ignore` names no part of the target,
            nothing in it can be made fast, or the chosen backend cannot run; the message says
            why.
    """
    options = chosen(options, keywords)
    parts = _not_ignored(target, options)
    _refuse_compiled(parts)
    from fastdiff.compiler.ahead import kernels
    from fastdiff.compiler.configured import configured, without_waiting
    from fastdiff.compiler.loop_state import check_invariant, sharing
    from fastdiff.compiler.pipelines import plannable, take_loop
    from fastdiff.compiler.text_cache import keep_texts, text_encoders

    parts = configured(target, parts, options)
    shared = sharing(target, options, plannable(target, parts))
    encoders = text_encoders(target, options.ignore) if options.text_cache else {}

    if not parts and not options.ignore:
        raise UserError(_nothing_fast(target, _eager_parts(target)))
    for module, _ in parts.values():
        if slot_of(module) is None and (lost := kept_slot(module)) is not None:
            lost.end()  # another compiled call replaced it, and was removed again
    slots = [
        Slot(name, module, kind)
        for name, (module, kind) in parts.items()
        if slot_of(module) is None
    ]
    if options.warm is not None and parts and not slots:
        raise UserError("Options.warm is given, but this is compiled already; restore it first")
    try:
        for slot in slots:
            slot.take()
            if slot.refused and slot.kind.runner != FASTDIFF:
                raise UserError(f"{slot.name} cannot run on {slot.kind.runner}: {slot.refused}")
        if slots and all(slot.refused for slot in slots):
            raise UserError(_nothing_fast(target, {slot.name: str(slot.refused) for slot in slots}))
        if why := without_waiting(slots, options):
            raise UserError(why)
        made = kernels(target, slots, options.warm)
        for slot in slots:
            slot.kernels = made
            slot.put()
        if LOOP not in options.ignore:
            take_loop(target, parts, shared, options.batch_invariant)
        check_invariant(target, options)
    except BaseException:
        _end(slots)
        raise
    keep_texts(encoders, options.text_cache)
    remember(target, [*(module for module, _ in parts.values()), *encoders.values()])
    return target


def restore(target: T) -> T:
    """Undo `compile`: calls run eagerly, and each parameter has contiguous memory of its own.

    Modules that were replaced since, or that torch.compile has wrapped, are restored, too; their
    torch.compile wrapper stays. A model shared by several pipelines becomes eager in all of
    them. Restore before you move a pipeline for good: otherwise, the memory that the kernels'
    layout needs on the old device is freed only at the next call.

    Returns:
        `target` itself; eager outputs are bit for bit what they were before `compile`.
    """
    parts = _parts(target)
    from fastdiff.compiler.pipelines import release_loop
    from fastdiff.compiler.text_cache import end_texts

    modules = [*(plain(module) for module, _ in parts.values()), *remembered(target)]
    end_texts(target, modules)
    _end([slot for module in modules if (slot := kept_slot(module)) is not None])
    release_loop(target)
    forget(target)
    return target


def _end(slots: Iterable[Slot]) -> None:
    """End every slot, even if ending another one raises."""
    with ExitStack() as stack:
        for slot in slots:
            stack.callback(slot.end)


@dataclass(frozen=True)
class Part:
    """One part of a pipeline, its backend, and the reason if that is not fastdiff."""

    name: str
    runs: str
    """"fastdiff" or another backend's name, "eager" (fastdiff supports the part, but something
    prevents it), "torch.compile" or "diffusers"."""
    why: str


@dataclass(frozen=True)
class Report:
    """What runs fast and what does not; `str(report)` is a table."""

    parts: tuple[Part, ...]
    note: str | None = None
    """What makes all parts slower than necessary, if anything."""
    tactics: str | None = None
    """On a GPU: how cuDNN chooses its plans for convolutions."""

    def __str__(self) -> str:
        name = max((len(part.name) for part in self.parts), default=0)
        runs = max((len(part.runs) for part in self.parts), default=0)
        lines = (f"{p.name:{name}}  {p.runs:{runs}}  {p.why}".rstrip() for p in self.parts)
        return "\n".join([*lines, *filter(None, (self.note, self.tactics))])


def report(target: Any) -> Report:
    """Which backend runs each component of a pipeline, and why.

    Components that are None have no row.
    """
    parts = _parts(target)
    from fastdiff.compiler.loop_state import Loop, loop_of
    from fastdiff.compiler.parts import schedulers_of
    from fastdiff.compiler.pipelines import why_not_planned
    from fastdiff.compiler.text_cache import text_caches

    def loop_part(loop: Loop | None) -> Part:
        if loop is None:
            return Part(LOOP, "diffusers", why_not_planned(target))
        notes = [f"{count} ran in diffusers' own loop: {why}" for why, count in loop.own.items()]
        return Part(LOOP, "fastdiff", "; ".join([str(loop), *notes]))

    ours = [_part(name, module) for name, (module, _) in parts.items()]
    schedulers = schedulers_of(target)
    if schedulers:
        loop = loop_of(target)
        ours.append(loop_part(loop))
        runner, does = ("diffusers", "steps") if loop is None else ("fastdiff", "coefficients")
        for name, scheduler in schedulers.items():
            if scheduler is not None:
                of_whom = f"{does} of {type(scheduler).__name__}, part of the loop"
                ours.append(Part(name, runner, of_whom))
    slots = (kept_slot(plain(module)) for module, _ in parts.values())
    told = (str(slot.kernels) for slot in slots if slot is not None and slot.kernels is not None)
    if kernels := next(told, ""):
        ours.append(Part("kernels", "Triton", kernels))
    whys = {name: [why] for name, why in _eager_parts(target).items()}
    for name, cache in text_caches(target).items():
        whys.setdefault(name, []).append(str(cache))
    theirs = [Part(name, "diffusers", "; ".join(why)) for name, why in whys.items()]
    return Report((*ours, *theirs), _note(parts), _tactics(parts))


def _tactics(parts: dict[str, Any]) -> str | None:
    from fastdiff.runtime import graphs, tactics

    slots = [slot for module, _ in parts.values() if (slot := slot_of(plain(module))) is not None]
    weights = (next(slot.module.parameters(), None) for slot in slots)
    if not any(weight is not None and weight.device.type == graphs.DEVICE for weight in weights):
        return None
    if not any(slot.kind.tactics for slot in slots):
        return "convolutions use cuDNN's heuristic: Options.tactics is off"
    return tactics.described()


def _note(parts: dict[str, Any]) -> str | None:
    from fastdiff.kernels import dispatch

    weights = (next(module.parameters(), None) for module, _ in parts.values())
    on_cpu = any(weight is not None and weight.device.type == "cpu" for weight in weights)
    return dispatch.NOT_BUILT if on_cpu and dispatch.NATIVE is None else None


def _part(name: str, module: nn.Module) -> Part:
    slot = kept_slot(plain(module))
    notes = [] if slot is None else _notes(slot)
    if slot_of(module) is None and torch_compiled(module):
        lent = [] if slot is None else ["fastdiff keeps its weights until it is restored"]
        reason = "not compiled by fastdiff: torch.compile has taken its place"
        return Part(name, "torch.compile", "; ".join([reason, *lent, *notes]))
    if slot is None or slot_of(module) is None:
        return Part(name, "eager", "not compiled")
    if slot.refused is not None:
        return Part(name, "eager", "; ".join([slot.refused, *notes]))
    return Part(name, slot.kind.runner, "; ".join([plural(slot.fast, "call"), *notes]))


def _notes(slot: Slot) -> list[str]:
    notes = [] if slot.network is None else slot.kind.notes(slot.network)
    notes += waiting_notes(slot)
    notes += [f"{plural(count, 'call')} ran eagerly: {why}" for why, count in slot.eager.items()]
    return notes + [f"float32 since float16 overflowed in {where}" for where in slot.promoted]


def _nothing_fast(target: Any, reasons: dict[str, str]) -> str:
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"nothing in this {type(target).__name__} can be made fast: {why}"


def _eager_parts(target: Any) -> dict[str, str]:
    from fastdiff.compiler.parts import eager_parts

    return eager_parts(target)


def _refuse_compiled(parts: dict[str, Any]) -> None:
    for name, (module, _) in parts.items():
        if slot_of(module) is None and torch_compiled(module):
            undo = "set its _compiled_call_impl to None"
            if plain(module) is not module:
                undo = "put its _orig_mod in its place"
            raise UserError(
                f"{name} is compiled with torch.compile already; {undo} and compile it with"
                f" fastdiff alone, or keep it with Options(ignore=({name.split('.')[0]!r},))"
            )


def _not_ignored(target: Any, options: Options) -> dict[str, Any]:
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
    from fastdiff.compiler.parts import parts

    try:
        return parts(target)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"fastdiff.compile needs {missing.name}; {installed.pip('diffusers')}"
        ) from missing
    except ValueError as unknown:
        raise UserError(str(unknown)) from None
