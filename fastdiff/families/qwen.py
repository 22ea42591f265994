"""Qwen-Image: diffusers' QwenImageTransformer2DModel."""

import math
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.qwen_file import PATCH, TOKENS, part
from fastdiff.families.unet import lora_scale
from fastdiff.models import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.qwen import Conditions, Qwen, borrow_qwen
from fastdiff.models.qwen_turns import Shapes
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_qwen(module, loan), searches)


def _call(
    qwen: Denoiser,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    img_shapes: Shapes | None = None,
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Any = None,
    additional_t_cond: Tensor | None = None,
    return_dict: bool = True,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`QwenImageTransformer2DModel.forward` on the compact network."""
    refuse(
        guidance=guidance,
        controlnet_block_samples=controlnet_block_samples,
        additional_t_cond=additional_t_cond,
    )
    lora_scale(attention_kwargs, "attention_kwargs")
    if not isinstance(timestep, Tensor) or timestep.shape != hidden_states.shape[:1]:
        raise Unsupported("its timestep is not a tensor of one timestep for each of the latents")
    given = Conditions(encoder_hidden_states, encoder_hidden_states_mask, img_shapes)
    prediction = qwen(hidden_states, timestep, given)
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _scale(*_: Any, attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    return lora_scale(attention_kwargs, "attention_kwargs")


def _planned(qwen: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(qwen.network), sizes)


def _example(net: Qwen, texts: int, tokens: int) -> Conditions:
    """Conditions with true guidance if there are two texts."""
    wide = net.context.weight.shape[1]
    text, *more = (empty(net.context.weight, 1, tokens, wide) for _ in range(texts))
    given = Conditions(text)
    return given._replace(negative=more[0], true_cfg_scale=4.0, do_true_cfg=True) if more else given


def _placed(given: Conditions, latents: Tensor) -> Conditions:
    side = math.isqrt(latents.shape[1])
    return given._replace(img_shapes=[(1, side, side)] * latents.shape[0])


def _shape(net: Qwen, side: int) -> tuple[int, ...]:
    return 1, (side // PATCH) ** 2, net.channels


def _channels(net: Qwen) -> int:
    return net.channels


def _unexported(network: Qwen) -> None:
    raise Unsupported("its true guidance joins two predictions, and an engine gives one")


def _multiple(net: Any) -> int:
    return PATCH


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, QWEN)}


DENOISED = Denoised(
    *(Conditions, _example, _channels, part, _unexported, _multiple, TOKENS),
    shape=_shape,
    placed=_placed,
)
QWEN = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("QwenImageTransformer2DModel",), taken=_taken, denoised=DENOISED)
