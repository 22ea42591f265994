"""Calls of diffusers' ControlNetModel on the compact network."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.fits import fit_trunk, one_text_each, refuse
from fastdiff.models import ControlNet, Loan, borrow_controlnet
from fastdiff.runtime.hoist import Conditions
from fastdiff.runtime.recordings import Recorded


@dataclass(frozen=True)
class StepControlNet:
    """The compact ControlNet, its per-step part recorded on a GPU (torch concatenates in it)."""

    network: ControlNet
    predict: Recorded


def borrow_step_controlnet(module: Any, loan: Loan, searches: bool = True) -> StepControlNet:
    network = borrow_controlnet(module, loan)
    return StepControlNet(network, Recorded(network.predict, searches))


def call_controlnet(
    net: StepControlNet,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Tensor,
    controlnet_cond: Tensor,
    conditioning_scale: float = 1.0,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guess_mode: bool = False,
    return_dict: bool = True,
    *,
    output: Any,
) -> Any:
    """`ControlNetModel.forward` on the compact network; `output` is the class of its results."""
    refuse(
        class_labels=class_labels,
        attention_mask=attention_mask,
        cross_attention_kwargs=cross_attention_kwargs or None,
    )
    network = net.network
    added = added_cond_kwargs or {}
    given = Conditions(
        encoder_hidden_states, added.get("text_embeds"), added.get("time_ids"), timestep_cond
    )
    fit_trunk(network, sample, given)
    one_text_each(encoder_hidden_states, sample)
    residuals = network(
        sample,
        torch.as_tensor(timestep, device=sample.device).reshape(-1),
        encoder_hidden_states,
        controlnet_cond,
        text_embeds=given.text_embeds,
        time_ids=given.time_ids,
        timestep_cond=timestep_cond,
        predict=net.predict,
    )
    if guess_mode and not network.pooled:
        scales = torch.logspace(-1, 0, len(residuals), device=sample.device) * conditioning_scale
        residuals = [residual * scale for residual, scale in zip(residuals, scales, strict=True)]
    elif conditioning_scale != 1:
        residuals = [residual * conditioning_scale for residual in residuals]
    if network.pooled:
        residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
    *down, middle = residuals
    if not return_dict:
        return down, middle
    return output(down_block_res_samples=down, mid_block_res_sample=middle)
