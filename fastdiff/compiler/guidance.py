"""How a loop combines its network's predictions, according to the pipeline's settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff.models import Unsupported
from fastdiff.plans import Plan
from fastdiff.runtime.guidance import Guidance

ASKED = (
    *("guidance_scale", "guidance_rescale", "do_classifier_free_guidance"),
    *("do_perturbed_attention_guidance", "pag_scale", "pag_adaptive_scale"),
    *("do_pag_adaptive_scaling", "_get_pag_scale", "_apply_perturbed_attention_guidance"),
)
"""What diffusers asks the pipeline in every step and a plan asks once."""


Setting = Callable[[str, Any], Any]
"""(name of a pipeline's property, what to return if it has none) -> its value in a call."""


@dataclass(frozen=True)
class Predictions:
    """The network's predictions for each of the latents in one step."""

    guided: bool
    """Whether one of them is unconditional (classifier-free guidance)."""
    perturbed: bool
    """Whether one of them is from perturbed attention."""

    @property
    def count(self) -> int:
        return 1 + self.guided + self.perturbed


def predictions_of(setting: Setting) -> Predictions:
    """What a loop predicts now; some pipelines have neither setting."""
    return Predictions(
        bool(setting("do_classifier_free_guidance", False)),
        bool(setting("do_perturbed_attention_guidance", False)),
    )


def guidance_of(setting: Setting, timesteps: Tensor) -> Guidance:
    """A loop's guidance now; a negative guidance_rescale is ignored.

    timesteps: [n], on which the scale of perturbed-attention guidance may depend.
    """
    now = predictions_of(setting)
    scale = setting("guidance_scale", 1.0)
    scale = 1.0 if scale is None else float(scale)
    rescale = max(0.0, float(setting("guidance_rescale", 0.0)))
    if not now.perturbed:
        return Guidance(scale, rescale, float(setting("_skip_layer_guidance_scale", 0.0)))
    scale_at = setting("_get_pag_scale", None)
    scales = [float(scale_at(t)) for t in timesteps.cpu()]
    perturbed = torch.tensor(scales, dtype=torch.float64)
    # without an unconditional prediction, diffusers does not rescale
    return Guidance(scale, rescale, perturbed) if now.guided else Guidance(-perturbed)


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: in some steps, a third prediction leaves layers out."""

    layers: tuple[int, ...]
    steps: range
    told: Mapping[str, Tensor]
    """This prediction's conditions, [B, ...], by field of the network's conditions."""

    def conditions(self, given: Any) -> Any:
        """The conditions of all three predictions; `given`: those of the first two."""
        own = {name: torch.cat([getattr(given, name), value]) for name, value in self.told.items()}
        return given._replace(**own, last_skip_layers=self.layers)


def skip_layers_of(setting: Setting, local: Mapping[str, Any], plan: Plan) -> SkipLayers | None:
    """The skip-layer guidance that a loop with these local variables asks for.

    Raises Unsupported for arguments that are not numbers, or together with an IP-Adapter.
    """
    if not plan.skips or local.get("skip_guidance_layers") is None:
        return None
    if not predictions_of(setting).guided:
        return None
    layers, count = local["skip_guidance_layers"], local["num_inference_steps"]
    bounds = local["skip_layer_guidance_start"], local["skip_layer_guidance_stop"]
    scale = setting("_skip_layer_guidance_scale", None)
    if not isinstance(layers, Sequence) or not all(isinstance(layer, int) for layer in layers):
        raise Unsupported("skip_guidance_layers other than a list of numbers")
    if not all(isinstance(value, int | float) for value in (*bounds, scale)):
        raise Unsupported("skip_layer_guidance_start, _stop or _scale other than a number")
    if (setting(plan.attention_kwargs, None) or {}).get(plan.pictures) is not None:
        raise Unsupported("skip-layer guidance together with an IP-Adapter")
    start, stop = (count * bound for bound in bounds)
    active = [i for i in range(len(local["timesteps"])) if start < i < stop]
    if not active:
        return None
    told = {field: local[name] for field, name in plan.skips.items()}
    return SkipLayers(tuple(layers), range(active[0], active[-1] + 1), told)


def with_repeats(given: Any, count: int, pictures: int) -> Any:
    """`given` conditions of `count` predictions for each picture; also says whether the last two
    predictions have the same conditions."""
    whole = count * pictures
    told = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.shape[0] == whole]
    same = all(torch.equal(t[-pictures:], t[-2 * pictures : -pictures]) for t in told)
    return given._replace(repeats=same)


def end_of_part(skips: SkipLayers | None, at: int, count: int) -> int:
    """The first of `count` steps after step `at` with another number of predictions, or `count`."""
    ends = (count,) if skips is None else (skips.steps.start, skips.steps.stop, count)
    return min(end for end in ends if end > at)
