"""What a denoising loop needs from a network, whether ours or an engine."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.models.hoisted import Hoisted


class Network(Protocol):
    """A network whose predictions a scheduler's step uses, for noisy latents: mostly [B, C, Y, X],
    or an embedding [B, D].

    `given` are the network's conditions, a named tuple with the argument names of diffusers'
    `forward`. G: predictions per latent, 2 with guidance (the unconditional one first), else 1.

    If a network has a true attribute `own_steps`, each picture may be at a different step: its
    `predict` takes rows of [n·B, …], where `hoist` makes n of them for one picture.
    """

    @property
    def recordable(self) -> bool:
        """Whether its steps may be recorded."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def check(self, latents: Tensor, given: Any, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        copies: G.
        """
        ...

    def hoist(self, given: Any, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        timesteps: [steps, n], n = 1 or one for each picture; sides: Y and X of the latents,
        or none.
        Raises Unsupported for conditions that fastdiff does not compute.
        """
        ...

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, …] -> [B, …] as `predict` reads and writes them; any strides."""
        ...

    def predict(self, x: Tensor, row: Any, constants: Any) -> Tensor:
        """The part that every step repeats: [B, ...] -> [G·B, ...], both contiguous. `row`: one of
        `Hoisted.rows`."""
        ...

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Any:
        """Undo `pack`."""
        ...
