"""Where a plan finds the values of a denoising loop: a row of `recipes` has one for each loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Where a plan finds the values of a denoising loop.

    A plan covers loops whose step is the network, guidance and the scheduler, and nothing else.
    """

    conditions: Mapping[str, str]
    """What the network receives: by field of its family's conditions, the local variable of the
    pipeline's `__call__` that holds it."""
    required: tuple[str, ...]
    """The variables that a version of diffusers must have for a plan."""
    returned: tuple[str, ...]
    """The variables, beside the latents, that a callback may return."""
    network: str = ""
    """The component that the loop repeats. "": the recipe's first."""
    last: str = ""
    """The component that the last step runs in place of `network`. "": there is none."""
    scheduler: str = "scheduler"
    """The component whose steps the loop takes."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """By name of the pipeline's property (`guidance_scale`, `do_classifier_free_guidance`), the
    variable that holds it where the pipeline has no such property. With the scale alone, the loop
    uses guidance unless it is 1."""
    attention_kwargs: str = ""
    """The pipeline's property that the network receives as an argument of the same name; it holds
    the scale of LoRA adapters. "" if there is none."""
    pictures: str = ""
    """The condition that IP-Adapters read; their output also depends on their scales. If it is not
    a variable, the attention kwargs hold it. "" if there is none."""
    step_options: str = ""
    """The variable that holds further arguments of the scheduler's `step`. "" if there is none."""
    step_arguments: tuple[str, ...] = ()
    """Variables that are arguments of `step` by their own names."""
    prev_timestep: bool = False
    """Whether `step` takes the following timestep by that name, and None in the last step."""
    told: Callable[[Any, Any], Any] = lambda timesteps, dtype: timesteps
    """(the scheduler's timesteps, the latents' dtype) -> the timesteps that the loop gives the
    network: some divide them, or round them to that dtype."""
    latents: str = "latents"
    """The variable that holds the latents."""
    float32: bool = False
    """Whether every step returns float32, whatever the latents were before the first."""
    entrance: str = "interrupt"
    """Where the plan enters the loop: "interrupt", the property that the loop reads at the top of
    every step, or "progress_bar", which it opens around all steps."""
    iterates: bool = False
    """Whether the loop is `for t in progress_bar(timesteps)`. Such a loop has no warm-up steps."""
    timesteps: str = ""
    """Of a loop that `iterates`: the variable over which its progress bar runs. "" if the pipeline
    has but one loop."""
    results: tuple[str, ...] = ()
    """Variables, beside `latents`, that hold the last step's sample after the loop."""
    schedulers: tuple[str, ...] = ()
    """The scheduler classes for which `results` are that sample; (): all."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the conditions that are the same in every call."""
    refused: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    """By variable, whether its value requires something that a plan cannot do."""
    beyond: bool = False
    """Whether guidance adds its scale times the difference to the prediction with the condition,
    not to the other."""
    absent: tuple[str, ...] = ()
    """Variables that must be None, because a plan cannot do what they require."""
    skips: Mapping[str, str] = field(default_factory=dict)
    """The conditions of skip-layer guidance's third prediction: by field, the variable. Empty if
    the pipeline has no such guidance."""
    noises: str = ""
    """The scheduler's method with which the loop noises the picture that it keeps outside of a
    mask. "" if it keeps none."""
    kept: str = ""
    """The variable of a mask outside of which every step leaves its sample unchanged. "" if there
    is none."""
    inverted: tuple[str, ...] = ()
    """Of a loop with `noises`: the variables of a mask that is 1 where the picture is kept, and of
    that picture; the first entry of both is for all pictures. (): `mask` and `image_latents`."""
    packs: bool = False
    """For a loop with `noises`: whether it packs the noised picture into tokens in every step."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """By field of the conditions, the variable that holds it where the first one is None."""
    unconditional: Mapping[str, str] = field(default_factory=dict)
    """By field of the conditions, the variable that holds the unconditional half, if the loop
    itself puts it before the other in every step."""
    alike: Mapping[str, str] = field(default_factory=dict)
    """By field of the conditions that both halves share, the variable of the unconditional one,
    which must be equal."""
    repeated: tuple[str, ...] = ()
    """Fields of the conditions that are the same for all pictures in most calls; then the network
    is given one."""
    unbatched: tuple[str, ...] = ()
    """Fields of the conditions that have no dimension of the pictures."""
    constant_channels: tuple[str, ...] = ()
    """The variables whose channels the loop puts behind the latents in every step, if the network
    takes more channels than the latents have."""
    always: bool = False
    """Whether the loop puts them there for any network."""
    controls: str = ""
    """The component of ControlNets that the loop runs in every step before the network, told the
    half with the text. "" if there is none."""
    distilled: str = ""
    """The variable of the distilled guidance of which the loop makes a tensor in every step, for
    the networks that embed one. "" if it does not."""
    only_read: bool = False
    """Whether the loop ignores a callback that returns them, or its mask."""
    scaled: str = "latents"
    """What `scale_model_input` is given: "latents"; "input", with the constant channels; "sample",
    if the scheduler also steps what it gives; "" if the loop does not call it."""
    conditional_first: bool = False
    """Whether the prediction with the condition comes before the unconditional one."""
    only_above_one: bool = False
    """Whether a guidance_scale below 1 also means no guidance, where `settings` has it alone."""
    doubled: bool = False
    """Whether the variable of the latents holds them once for each half of guidance, and the
    scheduler steps both halves."""
    many_steps: bool = False
    """Whether a loop of a single step takes another of its results, so that no plan runs it."""
    drops_variance: bool = False
    """Whether the loop drops the network's output for the variance."""
    variance: str = ""
    """For a loop that leaves the network's output for the variance out of guidance, and takes it
    from the half with the text: whether it is "kept" for the scheduler, or dropped unless the
    scheduler's config has a learned `variance_type`, which it must name ("asked") or may not have
    ("found"). "" for other loops."""

    @property
    def replaced(self) -> dict[str, str]:
        """The fields of the conditions that a callback may replace, by the name it returns."""
        return {name: field for field, name in self.conditions.items() if name in self.returned}
