"""The U-Net as its slot keeps it: called once, or as the step of a denoising loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.compiler.fits import controls_of, fit_images, fit_trunk, inners_of
from fastdiff.models import Loan, UNet, Unsupported, borrow_unet
from fastdiff.runtime.hoist import Conditions
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.recordings import Recorded


class Extras(NamedTuple):
    """What few calls of a U-Net are given."""

    downs: Sequence[Tensor] | None = None
    """A ControlNet's residuals."""
    middle: Tensor | None = None
    """Its last one."""
    inners: Sequence[Tensor] | None = None
    """A T2I-Adapter's residuals."""
    text_mask: Tensor | None = None
    """[B, T] of 0 and 1."""


@dataclass(frozen=True)
class StepUNet:
    """The compact U-Net, its per-step part recorded, and whole denoising loops with it."""

    network: UNet
    plans: Plans
    recorded: dict[tuple[int, int], Recorded] = field(default_factory=dict)
    """By how many residuals of ControlNets and T2I-Adapters it is given."""

    @property
    def dtype(self) -> torch.dtype:
        return self.network.conv_in.weight.dtype

    def fit(self, sample: Tensor, given: Conditions) -> None:
        """Raise Unsupported where diffusers itself would refuse a tensor, or convert it."""
        fit_trunk(self.network, sample, given)

    def __call__(
        self, sample: Tensor, timestep: Tensor, given: Conditions, extras: Extras
    ) -> Tensor:
        """`UNet2DConditionModel.forward`: [B, C, Y, X] -> [B, C, Y, X]."""
        network = self.network
        images = network.image_rows(given.image_embeds)
        fit_images(network, given, images)
        mask = None
        if extras.text_mask is not None:
            if extras.text_mask.ndim != 2:
                raise Unsupported(f"a text mask of {extras.text_mask.ndim} dimensions")
            mask = (1 - extras.text_mask.to(sample.dtype)) * -10000.0
            mask = mask[:, None, None, :]
        return network(
            sample,
            timestep,
            given.text,
            text_embeds=given.text_embeds,
            time_ids=given.time_ids,
            timestep_cond=given.timestep_cond,
            images=images,
            controls=controls_of(network, sample, extras.downs, extras.middle),
            inners=inners_of(network, sample, extras.inners),
            text_mask=mask,
            predict=self._predict,
        )

    def _predict(
        self, *given: Tensor, text_mask: Tensor | None, controls: int, inners: int
    ) -> Tensor:
        """`UNet.predict`, recorded unless there is a mask."""
        predict = self.network.predict
        if text_mask is not None:
            return predict(*given, text_mask=text_mask, controls=controls, inners=inners)
        key = controls, inners
        if key not in self.recorded:
            whole = partial(predict, controls=controls, inners=inners)
            self.recorded[key] = Recorded(whole, self.plans.searches)
        return self.recorded[key](*given)


def borrow_step_unet(module: nn.Module, loan: Loan, searches: bool = True) -> StepUNet:
    network = borrow_unet(module, loan)
    return StepUNet(network, Plans(network, searches))
