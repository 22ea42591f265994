"""The parts of a pipeline: which of them fastdiff runs, and which stay with diffusers."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fastdiff.families import Family, Kind, Taken, families, family, named
from fastdiff.models.borrow import kind
from fastdiff.recipes import RECIPES, Recipe, recipe_of

EAGER_PARTS = {
    "text_encoder": "once per prompt",
    "text_encoder_2": "once per prompt",
    "text_encoder_3": "once per prompt",
    "bert": "once per prompt",
    "image_encoder": "once per picture",
    "clip_model": "asked for gradients",
    "safety_checker": "once per picture",
    "adapter": "once per picture",
    "tokenizer": "not a network; once per prompt",
    "tokenizer_2": "not a network; once per prompt",
    "tokenizer_3": "not a network; once per prompt",
    "feature_extractor": "not a network; once per picture",
    "low_res_scheduler": "not a network; once per picture",
    "watermarker": "not a network; once per picture",
    "controlnet": "of a kind that fastdiff does not compute",
}
"""Components that stay with diffusers on purpose, and why."""


def parts(target: Any) -> Taken:
    """The modules of a pipeline or a bare model that fastdiff can run, by dotted name.

    A module wrapped by torch.compile is returned with its wrapper. Empty if there is no such part.

    Raises:
        ValueError: `target` is neither a known pipeline nor a known model.
    """
    known, has = networks(target), components(target)
    taken: Taken = {}
    for name, own in known.items():
        if name in has:
            taken |= own.taken(name, has[name])
    return taken


def denoiser_name(target: Any) -> str:
    """The component that a loop repeats: the first of a recipe's networks, or the bare model."""
    return next(iter(networks(target)))


def schedulers_of(target: Any) -> dict[str, Any]:
    """The schedulers whose steps a pipeline's loops take, by component; {} for a bare model."""
    recipe = recipe_of(target) or Recipe()
    names = dict.fromkeys(["scheduler", *(plan.scheduler for plan in recipe.plans)])
    return {name: getattr(target, name) for name in names if hasattr(target, name)}


def components(target: Any) -> dict[str, Any]:
    """The components of a pipeline and its other modules, by name, without those that are None. A
    bare model is one component."""
    if (bare := named(target)) is not None:
        return {bare[0]: target}
    given = [
        name
        for name, of in target.config.items()
        if isinstance(of, tuple | list) and not name.startswith("_")  # from_pipe keeps others so
    ]
    found = {name: getattr(target, name, None) for name in dict.fromkeys((*given, *vars(target)))}
    return {
        name: part
        for name, part in found.items()
        if part is not None and (name in given or isinstance(part, nn.Module))
    }


def eager_parts(target: Any) -> dict[str, str]:
    """The parts of `target` that stay with diffusers, and why: components that fastdiff does not
    run (except the scheduler), and the remaining parts of those that it does."""
    known, has = networks(target), components(target)
    taken = {path.partition(".")[0] for path in parts(target)}
    whole = {
        name: EAGER_PARTS.get(name, f"{kind(part)}, which fastdiff does not compute")
        for name, part in has.items()
        if name not in taken | schedulers_of(target).keys()
    }
    return (
        whole
        | {
            f"{name}.{part}": why
            for name, own in known.items()
            for part, why in own.left.items()
            if getattr(has.get(name), part, None) is not None
        }
        | {
            f"{name}.{part}": why
            for name, own in known.items()
            if name in has
            for part, why in own.asked(has[name]).items()
        }
    )


def networks(target: Any) -> dict[str, Family]:
    """The families of the networks that fastdiff computes, by component; ValueError for an unknown
    target."""
    bare, recipe = named(target), recipe_of(target)
    if bare is not None:
        return dict([bare])
    if recipe is None:
        models = [model for own in families().values() for model in own.models]
        raise ValueError(
            f"fastdiff cannot compile a {type(target).__name__}; it compiles"
            f" {', '.join(RECIPES)}, {', '.join(models[:-1])} and {models[-1]}"
        )
    return {name: family(own) for name, own in recipe.networks.items()}


def without_tactics(kind: Kind) -> Kind:
    """The same kind, but cuDNN chooses its own plans."""
    return replace(kind, borrow=partial(kind.borrow, searches=False), tactics=False)


def in_strips(kind: Kind) -> Kind:
    """The same kind, but it decodes large pictures in strips if it can."""
    if kind.cuts is None:
        return kind
    return replace(kind, borrow=partial(kind.borrow, exact=True), cuts=True)
