"""A network as its slot keeps it: for single calls, and for whole denoising loops."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.network import Network
from fastdiff.runtime.recordings import Recorded, first_of


@dataclass(frozen=True)
class Denoiser:
    """A network, the function that runs it in single calls, and its loops."""

    network: Network
    plans: Plans
    once: Callable[..., Tensor]
    """Same arguments and result as `network.predict`."""
    beside: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """Denoisers of `runtime.controlled`, with this network."""
    _shared: dict[Callable[[Tensor], Tensor], Plans] = field(
        default_factory=dict, repr=False, compare=False
    )

    def shared(self, gather: Callable[[Tensor], Tensor]) -> Plans:
        """Its loops if other processes make some of a step's predictions; see `Plans`."""
        if gather not in self._shared:
            self._shared[gather] = self.plans.gathering(gather)
        return self._shared[gather]

    def __call__(self, latents: Tensor, timestep: Tensor | float | int, given: Any) -> Any:
        """The network's prediction for latents [B, …] at a timestep [] or [B].

        Raises Unsupported if only the module's own call gives the same result.
        """
        network, sides = self.network, tuple(latents.shape[2:])
        network.check(latents, given)
        timesteps = torch.as_tensor(timestep, device=latents.device)
        shape, fits = list(timesteps.shape), timesteps.numel() in (1, len(latents))
        require(timesteps.ndim <= 1 and fits, f"timesteps {shape} for {len(latents)} latents")
        timesteps = timesteps.reshape(1, -1)
        rows, constants = network.hoist(given, timesteps, sides)
        made = self.once(network.pack(latents).contiguous(), first_of(rows), constants)
        return network.unpack(made, sides)


def denoiser(network: Network, searches: bool = True) -> Denoiser:
    """Record single calls once per shape. `searches`: as for `recordings.runner`."""
    return Denoiser(network, Plans(network, searches), Recorded(network.predict, searches))
