"""The table of recipes against diffusers' classes and against the documentation."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest

from fastdiff.bench.presets import PRESETS
from fastdiff.compiler.controls import LOCALS
from fastdiff.families import family
from fastdiff.recipes import RECIPES, Recipe, needs_picture

ROOT = Path(__file__).parent.parent
NAMED = {name: recipe for name, recipe in RECIPES.items() if "." not in name}
"""Rows of the documented table; the other rows are named by a module path."""
OWN = {name: recipe for name, recipe in NAMED.items() if not recipe.community}
"""Rows of diffusers' own classes."""
ROWS = [pytest.param(name, recipe, id=name) for name, recipe in OWN.items()]
PLANNED = [row for row in ROWS if row.values[1].plans]


MODULAR = [name for name in OWN if issubclass(getattr(diffusers, name), diffusers.ModularPipeline)]
"""Modular pipelines, whose components their blocks name; ModularPipeline takes a user's blocks."""


def components(name):
    """The components that a pipeline's constructor takes, or that its blocks name."""
    cls = getattr(diffusers, name)
    if name in MODULAR:
        return set(cls().component_names)
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def sources(name):
    """The source of a pipeline's module; of a modular one all modules of its folder."""
    module = inspect.getmodule(getattr(diffusers, name))
    path = Path(module.__file__)
    return "".join(p.read_text() for p in (path.parent.glob("*.py") if name in MODULAR else [path]))


@pytest.mark.parametrize(("name", "recipe"), ROWS)
def test_a_row_names_components_of_its_class(name, recipe):
    assert name == "ModularPipeline" or set(recipe.networks) <= components(name)
    assert all(family(recipe.networks[plan.network]).denoised for plan in recipe.plans)
    if recipe.from_text:
        twin = RECIPES[recipe.from_text]
        assert twin.from_text in ("", recipe.from_text)
        assert set(twin.networks) <= set(recipe.networks)
        if not twin.from_text:
            assert not needs_picture(getattr(diffusers, recipe.from_text))


@pytest.mark.parametrize(("name", "recipe"), PLANNED)
def test_a_plan_names_variables_of_the_loop(name, recipe):
    call = inspect.unwrap(getattr(diffusers, name).__call__)
    code, source = call.__code__, inspect.getsource(call)
    variables = {*code.co_varnames, *code.co_cellvars}
    asks = {
        "self.interrupt": ("interrupt", False),
        "with self.progress_bar(total=": ("progress_bar", False),
    }
    for plan in recipe.plans:
        own = () if plan.iterates else ("timesteps",)
        named = {plan.latents, *own, *plan.step_arguments, *plan.required, *plan.settings.values()}
        assert named <= variables
        assert set(plan.required) <= set(plan.conditions.values()) <= variables
        denoised = family(recipe.networks[plan.network]).denoised
        assert {*plan.conditions, plan.pictures} - {""} <= set(denoised.conditions._fields)
        assert set(plan.replaced.values()) <= set(plan.conditions)
        assert {plan.network, plan.last or plan.network, plan.scheduler} <= components(name)
        assert {*plan.unconditional, *plan.repeated} <= set(plan.conditions)
        assert {*plan.unconditional.values(), *plan.constant_channels} <= variables
        assert {plan.kept, plan.distilled, *(LOCALS if plan.controls else ())} - {""} <= variables
        assert {plan.controls or plan.network} <= recipe.networks.keys()
        assert ("scale_model_input" in source) == bool(plan.scaled)
        if plan.scaled and plan.constant_channels:  # joined after or before
            joined = re.search(rf"torch.cat\(\[.*, {plan.constant_channels[0]}\b", source)
            before = joined.start() < source.index("scale_model_input")
            assert before == (plan.scaled == "input")
        over = plan.timesteps or "self.scheduler.timesteps"
        bars = [f"in {every}self.progress_bar({over})" for every in ("", "enumerate(")]
        every = asks | dict.fromkeys(bars, ("progress_bar", True))
        found = next(entrance for text, entrance in every.items() if text in source)
        assert found == (plan.entrance, plan.iterates)
        assert set(plan.results) <= variables
        shown = getattr(getattr(diffusers, name), "_callback_tensor_inputs", ())
        assert set(plan.returned) <= set(shown)
    assert len({plan.network for plan in recipe.plans}) == len(recipe.plans)


@pytest.mark.parametrize(("name", "recipe"), ROWS)
def test_recipes_upcast_exactly_where_the_class_reads_force_upcast(name, recipe):
    assert ("force_upcast" in sources(name)) == recipe.upcasts


def line_of(name: str, recipe: Recipe) -> str:
    computed = ", ".join(f"`{network}`" for network in recipe.networks)
    count = len(recipe.plans)
    loop = f"{count} plans" if count > 1 else "a plan" if count else "diffusers'"
    whose = f" (community: `{recipe.community}`)" if recipe.community else ""
    return f"| `{name}`{whose} | {computed} | {loop} | {'yes' if recipe.exported else ''} |"


def test_the_documented_table_equals_the_recipes():
    text = (ROOT / "docs/pipelines.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+`[^|]*\| `", line)]
    assert rows == [line_of(name, recipe) for name, recipe in NAMED.items()]


def test_the_textbook_names_existing_classes_and_presets():
    """Where only the networks are compiled, the class is any of diffusers'."""
    text = (ROOT / "docs/textbook.md").read_text()
    rows = [line.split("|")[2:4] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for classes, presets in rows:
        named = set(re.findall(r"`([^`]+)`", classes))
        assert named
        assert named <= set(dir(diffusers) if "U-Nets of" in classes else RECIPES)
        assert set(re.findall(r"`([^`]+)`", presets)) <= set(PRESETS)
