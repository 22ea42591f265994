"""Draws with a compiled pipeline in this process: a batch that requests join between steps."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from fastdiff.batching import Batch, Cancelled, Request
from fastdiff.bench.pipelines import check_prompt, check_size, check_steps
from fastdiff.bench.source import rescheduled
from fastdiff.errors import UserError
from fastdiff.recipes import negates
from fastdiff.serve.drawing import Accepted, Drawing, Event, Picture, Step
from fastdiff.serve.refused import cancelled


class Painter:
    """An `Engine` on one compiled pipeline, which the painter owns until `close`.

    Args:
        pipe: a pipeline after `fastdiff.compile`.
        capacity, workers: as of `Batch`.
        steps, guidance_scale: of a picture that gives none; None: the pipeline's default.
        pixels: the most that a picture may have; None: 1.5 times those of the pipeline's size.

    Raises:
        ValueError: the pipeline does not draw from text alone, or `Batch` cannot use it.
    """

    def __init__(
        self,
        pipe: Any,
        capacity: int = 4,
        workers: int = 1,
        *,
        steps: int = 25,
        guidance_scale: float | None = None,
        pixels: int | None = None,
    ) -> None:
        self._takes = inspect.signature(pipe.__call__).parameters
        check_prompt(pipe)
        self.pipe, self.places = pipe, capacity * workers
        self._steps, self._guidance = steps, guidance_scale
        height, width = check_size(pipe, None, None)
        self._pixels = height * width * 3 // 2 if pixels is None else pixels
        self._batch = Batch(pipe, capacity, workers)

    async def draw(self, drawing: Drawing) -> AsyncIterator[Event]:
        """See `Engine.draw`."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        shown = drawing.previews

        def on_step(done: int, steps: int, latents: Tensor) -> None:
            # the nearest step to each of `shown` evenly spaced places
            due = done < steps and any(
                round(i * steps / (shown + 1)) == done for i in range(1, shown + 1)
            )
            tell(Step(done, steps, self._preview(latents) if due else None))

        ticket = self._batch.submit(self._request(drawing, on_step))
        ticket.add_done_callback(tell)
        try:
            yield Accepted()
            while (event := await events.get()) is not ticket:
                yield event
            yield Picture(await asyncio.to_thread(_png, ticket.result()))
        except Cancelled:  # the batch is closed
            raise cancelled() from None
        finally:
            ticket.cancel()

    def close(self) -> None:
        """See `Engine.close`."""
        self._batch.close(drain=False)

    def _request(self, drawing: Drawing, on_step: Any) -> Request:
        """The batch's request; UserError if the pipeline cannot draw it."""
        pipe, kind = self.pipe, type(self.pipe).__name__
        steps = self._steps if drawing.steps is None else drawing.steps
        scheduler = None
        try:
            check_steps(pipe, steps)
            height, width = check_size(pipe, drawing.height, drawing.width)
            if drawing.scheduler is not None:
                scheduler = rescheduled(pipe, drawing.scheduler)
        except UserError as error:
            raise UserError(str(error).removeprefix("--")) from None
        if height * width > self._pixels:
            raise UserError(
                f"size is {width}x{height}; this server draws at most {self._pixels} pixels"
            )
        if drawing.negative_prompt is not None and not negates(self._takes):
            raise UserError(f"negative_prompt: a {kind} takes none; leave it out")
        if drawing.previews and not self._decodes:
            raise UserError(f"partial_images: a {kind}'s latents are not shown; leave it out")
        scale = self._guidance if drawing.guidance_scale is None else drawing.guidance_scale
        return Request(
            drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            num_inference_steps=steps,
            guidance_scale=scale,
            seed=drawing.seed,
            height=height,
            width=width,
            scheduler=scheduler,
            on_step=on_step,
        )

    @property
    def _decodes(self) -> bool:
        """Whether the autoencoder decodes unchanged latents, [1, C, Y, X]."""
        vae = getattr(self.pipe, "vae", None)
        config = getattr(vae, "config", {})
        if vae is None or "latent_channels" not in config or "scaling_factor" not in config:
            return False
        # SDXL's overflows in float16, and its pipeline makes it float32 only for the last decode
        return not (vae.dtype == torch.float16 and config.get("force_upcast"))

    def _preview(self, latents: Tensor) -> bytes:
        """A PNG of latents [1, C, Y, X], including their noise."""
        vae, config = self.pipe.vae, self.pipe.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        with torch.no_grad():
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
            if mean is not None and std is not None:
                by_channel = torch.tensor([std, mean]).to(latents)[:, None, :, None, None]
                latents = latents * by_channel[0] + by_channel[1]
            decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return _png(self.pipe.image_processor.postprocess(decoded, output_type="pil")[0])


def _png(image: Any) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
