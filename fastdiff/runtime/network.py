"""What a denoising loop asks of a network, whatever it is: our own, or an engine's."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.models.hoisted import Hoisted


class Network(Protocol):
    """A network that predicts for noisy latents [B, C, Y, X] what a scheduler's step asks for.

    `given` are its own conditions, a named tuple with the names of diffusers' `forward`. G: how
    many predictions it makes of one, 2 with guidance, the unconditional one first.
    """

    @property
    def recordable(self) -> bool:
        """Whether its steps may be recorded."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def check(self, latents: Tensor, given: Any, copies: int = 1) -> None:
        """Raise Unsupported where diffusers itself would refuse a tensor, or convert it.

        copies: G.
        """
        ...

    def hoist(self, given: Any, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Everything that does not depend on the latents.

        timesteps: [steps, n], n = 1 or one for each picture; sides: Y and X of the latents.
        Raises Unsupported for conditions that the runtime does not compute with.
        """
        ...

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, ...] in the order that `predict` takes and gives, of any strides."""
        ...

    def predict(self, x: Tensor, row: Any, constants: Any) -> Tensor:
        """What every step repeats: [B, ...] -> [G·B, ...], contiguous both. `row`: one of
        `Hoisted.rows`."""
        ...

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Any:
        """Undo `pack`."""
        ...
