"""A U-Net in another runtime's file, told and asked what the denoising plan tells and asks ours."""

import threading
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.engines.bound import Bound, Engine

ADDED = ("timestep_cond", "text_embeds", "time_ids")
"""Inputs beside the timestep that are one row for each text, in the order of `time_rows`."""


class EngineUNet:
    """Inputs and outputs as `fastdiff export` names them, channels first.

    The plan hands each step a row of `time_rows`: here the timestep and, side by side, what else
    depends on nothing but the prompt. The text goes in as it is: its projections are the engine's.

    Args:
        engine: what computes.
        widths: of each input among `ADDED` that the engine has, by name.
        timestep: the shape of that input, () or (1,).
        channels: of its output.
    """

    ip_adapters = None

    def __init__(
        self, engine: Engine, widths: dict[str, int], timestep: tuple[int, ...], channels: int
    ) -> None:
        self.engine, self._timestep, self._channels = engine, timestep, channels
        self._added = [name for name in ADDED if name in widths]
        self._columns = list(
            pairwise(accumulate((widths[name] for name in self._added), initial=1))
        )
        self._bound: dict[tuple[int, ...], Bound] = {}
        self._lock = threading.Lock()

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may hold its steps."""
        return self.engine.recordable

    def text_rows(self, encoder_hidden_states: Tensor) -> Tensor:
        """[B, T, D] as it is."""
        return encoder_hidden_states

    def image_rows(self, image_embeds: Any) -> tuple[Tensor, ...]:
        """None: an engine has no IP-Adapters."""
        return ()

    def time_rows(
        self,
        timestep: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """[..., 1 + widths] float32, a row for each text; `timestep` [...] as for `UNet`."""
        given = {"timestep_cond": timestep_cond, "text_embeds": text_embeds, "time_ids": time_ids}
        rows = [tensor.float() for name in self._added if (tensor := given[name]) is not None]
        times = timestep.float()[..., None]
        if rows:
            rows = [row.expand(*times.shape[:-2], *row.shape) for row in rows]
            times = times.expand(*times.shape[:-2], rows[0].shape[-2], 1)
        return torch.cat([times, *rows], dim=-1)

    def predict(self, x: Tensor, rows: Tensor, text: Tensor, *more: Tensor) -> Tensor:
        """[B, Y, X, C] latents -> [G·B, Y, X, C]; arguments as of `UNet.predict`."""
        batch, height, width, channels = x.shape
        texts, tokens, depth = text.shape
        bound = self._bind(texts, height, width, channels, tokens, depth)
        with self._lock:  # two threads share its memory
            given = bound.inputs
            copies = given["sample"].unflatten(0, (texts // batch, batch))
            copies.copy_(x.permute(0, 3, 1, 2))
            given["timestep"].copy_(rows[0, 0])
            given["encoder_hidden_states"].copy_(text)
            for name, (start, end) in zip(self._added, self._columns, strict=True):
                given[name].copy_(rows[:, start:end])
            bound.run()
            output = bound.outputs["out_sample"].permute(0, 2, 3, 1)
            return output.clone(memory_format=torch.contiguous_format)  # the next run overwrites it

    def _bind(self, *sizes: int) -> Bound:
        if sizes not in self._bound:
            texts, height, width, channels, tokens, depth = sizes
            inputs: dict[str, Sequence[int]] = {
                "sample": (texts, channels, height, width),
                "timestep": self._timestep,
                "encoder_hidden_states": (texts, tokens, depth),
            }
            for name, (start, end) in zip(self._added, self._columns, strict=True):
                inputs[name] = (texts, end - start)
            outputs = {"out_sample": (texts, self._channels, height, width)}
            self._bound[sizes] = self.engine.bind(inputs, outputs)
        return self._bound[sizes]
