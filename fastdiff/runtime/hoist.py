"""What a denoising loop needs of the network's conditions, computed once per image."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Network(Protocol):
    """What a denoising loop asks of a U-Net: our own `UNet`, or an engine that stands for it."""

    @property
    def recordable(self) -> bool:
        """Whether its steps may be recorded."""
        ...

    @property
    def ip_adapters(self) -> Any:
        """None where it has none."""
        ...

    def text_rows(self, encoder_hidden_states: Tensor) -> Tensor: ...

    def time_rows(
        self,
        timestep: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor: ...

    def image_rows(self, image_embeds: Any) -> tuple[Tensor, ...]: ...

    def predict(self, x: Tensor, rows: Tensor, text: Tensor, *more: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Conditions:
    """What the network is told besides the latents. G: 2 with guidance (unconditional first)."""

    text: Tensor
    """[G·B, T, D] as the text encoder gives it."""
    text_embeds: Tensor | None = None
    """[G·B, D'] of SDXL."""
    time_ids: Tensor | None = None
    """[G·B, 6] of SDXL."""
    timestep_cond: Tensor | None = None
    """[B, D''] guidance embedding of distilled models; they run without guidance."""
    image_embeds: Any = None
    """Of each IP-Adapter [G·B, N, ...], for N pictures."""


@dataclass(frozen=True)
class Hoisted:
    text: Tensor
    """[G·B, T, …] keys and values of every cross-attention: one matrix product."""
    rows: Tensor
    """[steps, n, …] time embedding as every resnet sees it, n = 1 where all pictures share it: one
    matrix product for all steps."""
    images: tuple[Tensor, ...]
    """[G·B, tokens, …] of each IP-Adapter, like `text`."""


def hoist(network: Network, timesteps: Tensor, conditions: Conditions) -> Hoisted:
    """Everything of `network` that does not depend on the latents, for `timesteps` [steps]."""
    return Hoisted(
        text=network.text_rows(conditions.text),
        rows=network.time_rows(
            timesteps.to(conditions.text.device)[:, None],
            conditions.text_embeds,
            conditions.time_ids,
            conditions.timestep_cond,
        ),
        images=network.image_rows(conditions.image_embeds),
    )
