"""Qwen-Image's transformer as an exported file. diffusers turns its heads by complex numbers, which
ONNX Runtime does not compute."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families.part import (
    EXPORTED,
    PACKED,
    Part,
    Port,
    dtype_name,
    exportable,
    packed_cases,
)
from fastdiff.families.positions import TurnedOnce, Turns, attending

PATCH = 2
"""Rows and columns of the latents in each token."""
TOKENS = 64
"""Tokens of a prompt of some forty words; diffusers takes up to 1024."""


class _Joint(FluxAttnProcessor):
    """Text and picture attend to both, the text first: the same as Qwen's own processor."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: Turns,
        attention_mask: None = None,
        encoder_hidden_states_mask: None = None,
        *,
        attended: Tensor,
    ) -> tuple[Tensor, Tensor]:
        picture = torch.ones_like(hidden_states[:, :, 0], dtype=torch.bool)
        mask = torch.cat((attended, picture), dim=1)[:, None, None, :]
        joint: Any = super().__call__
        made: tuple[Tensor, Tensor] = joint(
            attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb
        )
        return made


class _Places(nn.Module):
    """In place of QwenEmbedRope; it is given the positions of both instead of shapes."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.turned = TurnedOnce(source)

    def forward(self, ids: tuple[Tensor, Tensor], **_: Any) -> Turns:
        made: Turns = self.turned(torch.cat(ids))
        return made


class _Exported(nn.Module):
    """hidden_states [B, L, C], timestep [] or [1], text [B, T, D], mask [B, T] of 0 and 1, img_ids
    [L, 3], txt_ids [T, 3] -> out_sample [B, L, C']."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        replaced = {"QwenEmbedRope": _Places, "Attention": lambda one: attending(_Joint(), one)}
        self.net = exportable(net, EXPORTED | replaced)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> tuple[Tensor, ...]:
        net: Any = self.net
        many = hidden_states.shape[0]
        return (
            net(
                hidden_states,
                text,
                timestep=timestep.reshape(-1).expand(many),
                img_shapes=(txt_ids, img_ids),
                # diffusers compares the mask's shape, which torch's exporter then takes as fixed
                attention_kwargs={"attended": mask.bool().expand(many, -1)},
                return_dict=False,
            )[0],
        )


def part(
    folder: str, net: nn.Module, dtype: torch.dtype, _: int = 0, timestep: tuple[int, ...] = ()
) -> Part:
    """Its file. UserError for a network that edits pictures or layers."""
    config: Any = net.config
    last: Any = net.get_submodule("proj_out")
    for key in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if config.get(key):
            raise UserError(f"{folder} has {key}, which cannot be exported")
    free, kind, axes = "batch_size", dtype_name(dtype), len(config.axes_dims_rope)
    text = (free, "sequence_length")
    example, *cases = packed_cases(TOKENS)
    return Part(
        folder=folder,
        source=net,
        module=_Exported(net).eval(),
        dtype=dtype,
        inputs=(
            Port("hidden_states", kind, (free, PACKED, config.in_channels)),
            Port("timestep", "float32", timestep),
            Port("encoder_hidden_states", kind, (*text, config.joint_attention_dim)),
            Port("encoder_hidden_states_mask", "int64", text),
            Port("img_ids", "float32", (PACKED, axes)),
            Port("txt_ids", "float32", ("sequence_length", axes)),
        ),
        outputs=(Port("out_sample", kind, (free, PACKED, last.out_features)),),
        example=example,
        cases=tuple(cases),
        unit=0.001,
        packed=PATCH,
        told=_told,
        guided=False,
    )


def _told(given: dict[str, Any]) -> dict[str, Any]:
    """With the positions of the picture's tokens, around 0, and of the text's, after them; and a
    mask."""
    text = given["encoder_hidden_states"]
    mask = given.get("encoder_hidden_states_mask")
    frames, rows, columns = given["img_shapes"][0][0]
    first = max(rows // 2, columns // 2)
    axes = [torch.arange(frames), *(torch.arange(n) - (n - n // 2) for n in (rows, columns))]
    behind = torch.arange(first, first + text.shape[1])
    return given | {
        "encoder_hidden_states_mask": torch.ones(text.shape[:2]) if mask is None else mask,
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": behind[:, None].expand(-1, len(axes)),
    }
