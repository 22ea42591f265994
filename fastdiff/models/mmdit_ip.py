"""SD3's IP-Adapters: image prompts as extra tokens that the picture attends to.

Their keys and values depend on the image prompts and the timestep, never on the latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan
from fastdiff.models.joint_attention import IP_PROCESSOR
from fastdiff.models.watch import kind


@dataclass(frozen=True)
class JointIPAdapter:
    """An IP-Adapter; the scales are read from diffusers' processors at every use."""

    projection: Any
    """diffusers' IPAdapterTimeImageProjection, which is called rather than borrowed."""
    processors: tuple[Any, ...]
    """One for every attention, in order; their parts are called, too."""
    heads: int

    @property
    def channels(self) -> int:
        """The channels of the image embeddings that it takes."""
        channels: int = self.projection.proj_in.in_features
        return channels

    def rows(self, image_embeds: Tensor, timesteps: Tensor) -> tuple[Tensor | None, ...]:
        """Keys and values for every attention: [steps, B, tokens, 2·D], None if its scale is 0.

        Args:
            image_embeds: [B, tokens', D'].
            timesteps: [steps, n], n = 1 or a divisor of B.
        """
        active = [processor.scale != 0 for processor in self.processors]
        steps = []
        for timestep in timesteps.to(image_embeds.device):
            each = timestep.repeat(image_embeds.shape[0] // timestep.shape[0])
            tokens, embedded = self.projection(image_embeds, each)
            steps.append(
                [
                    self._packed(processor, tokens, embedded) if used else None
                    for processor, used in zip(self.processors, active, strict=True)
                ]
            )
        return tuple(
            torch.stack([packed for packed in column if packed is not None]) if used else None
            for column, used in zip(zip(*steps, strict=True), active, strict=True)
        )

    def scales(self, like: Tensor, width: int) -> Tensor:
        """[attentions, width]: each attention's scale, repeated for all channels."""
        scales = [processor.scale for processor in self.processors]
        require(
            all(isinstance(scale, int | float) for scale in scales),
            "an IP-Adapter scale that is not a number",
        )
        column = torch.tensor(scales, dtype=like.dtype).to(like.device)
        return column[:, None].expand(-1, width).contiguous()

    def _packed(self, processor: Any, tokens: Tensor, embedded: Tensor) -> Tensor:
        """[B, tokens, 2·D] for one attention."""
        normed = processor.norm_ip(tokens, temb=embedded)
        key = processor.to_k_ip(normed).unflatten(-1, (self.heads, -1))
        return torch.cat([processor.norm_ip_k(key).flatten(2), processor.to_v_ip(normed)], dim=-1)


def borrow_joint_ip_adapter(
    projection: Any, attentions: Sequence[Any], loan: Loan
) -> JointIPAdapter | None:
    """From a transformer's image_proj and its attentions; None if it has no IP-Adapter."""
    carried = [kind(attention.processor) == IP_PROCESSOR for attention in attentions]
    if projection is None:
        require(not any(carried), "IP-Adapter processors without a projection (image_proj)")
        return None
    require(all(carried), "an IP-Adapter in only some of the attentions")
    require(kind(projection) == "IPAdapterTimeImageProjection", f"a {kind(projection)}")
    loan.called(projection)
    for attention in attentions:
        processor = loan.open(attention.processor, IP_PROCESSOR)
        for part in (processor.norm_ip, processor.to_k_ip, processor.to_v_ip, processor.norm_ip_k):
            loan.called(part)
    heads = {attention.heads for attention in attentions}
    require(len(heads) == 1, "attentions with different heads")
    return JointIPAdapter(projection, tuple(a.processor for a in attentions), heads.pop())
