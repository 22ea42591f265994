"""A denoising loop on buffers against diffusers' own scheduler, with a network of two kernels."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fastdiff.kernels.concat import concat
from fastdiff.kernels.contract import judge
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime.guidance import Guidance, Inpainting
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.recordings import made
from fastdiff.runtime.schedulers import probe

SHAPE, STEPS = (2, 4, 3, 5), 4
SCALE, STRENGTHS = 3.5, torch.tensor([2.0, 0.0, -1.0, 0.5])


@dataclass(frozen=True)
class Network:
    """Three outputs for each sample: a product with a weight, plus a different constant picture."""

    weight: Tensor
    recordable = True

    @property
    def dtype(self):
        return self.weight.dtype

    def pack(self, latents):
        return channels_last(latents)

    def unpack(self, x, sides):
        return channels_first(x)

    def predict(self, x, row, constants):
        flat = x.reshape(1, -1)
        three = concat(concat(flat, flat), flat).view(constants.shape)
        return linear(three, self.weight, residual=constants)


def eager(scheduler, network, pictures, latents, inpainting, dtype):
    """What an inpainting pipeline with perturbed-attention guidance does."""
    cast = [value.to(dtype) for value in (network.weight, pictures, latents, *inpainting[:3])]
    weight, pictures, x, mask, original, noise = cast
    for i, t in enumerate(scheduler.timesteps):
        outputs = torch.einsum("oc,bcyx->boyx", weight, torch.cat([x] * 3)) + pictures
        unguided, text, perturbed = outputs.chunk(3)
        output = unguided + SCALE * (text - unguided) + STRENGTHS[i] * (text - perturbed)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        kept = original
        if i + 1 < STEPS:
            kept = scheduler.add_noise(original, noise, scheduler.timesteps[i + 1 : i + 2])
        x = (1 - mask) * kept + mask * x
    return x


@torch.no_grad()
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_perturbed_guidance_with_inpainting(kind):
    scheduler = kind(beta_schedule="scaled_linear")
    scheduler.set_timesteps(STEPS)
    torch.manual_seed(0)
    network = Network(torch.randn(4, 4).div(4).t())
    pictures, latents = torch.randn(6, 4, 3, 5), torch.randn(SHAPE)
    levels = scheduler.alphas_cumprod[scheduler.timesteps[1:]].double()
    factors = torch.cat([torch.stack([levels, 1 - levels], 1).sqrt(), torch.tensor([[1.0, 0.0]])])
    inpainting = Inpainting(torch.rand(2, 1, 3, 5), torch.randn(SHAPE), torch.randn(SHAPE), factors)
    table = probe(scheduler)
    assert table.editable
    plans = Plans(network)
    hoisted = Hoisted(rows=torch.zeros(STEPS, 1), constants=channels_last(pictures))
    guidance = Guidance(SCALE, perturbed=STRENGTHS)
    other = (-latents, table, Guidance(2.0), hoisted._replace(constants=-hoisted.constants))

    def draw(between):
        with plans.start(latents, table, guidance, hoisted, inpainting) as run:
            for _ in range(STEPS):
                assert run._step.recording is not None
                run.advance()
                between(run)
            return run.latents(torch.float32)

    def another():
        """A loop with other conditions."""
        with plans.start(*other, inpainting._replace(mask=inpainting.mask / 2)) as run:
            assert run._step.recording is not None
            run.advance()

    with pytest.raises(ZeroDivisionError):
        draw(lambda run: run.lend(lambda: 1 / 0))
    got = draw(lambda run: None)
    before = made()
    assert torch.equal(got, draw(lambda run: run.lend(another)))
    assert made() == before  # both in one recording
    wanted = {}
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(STEPS)
        wanted[dtype] = eager(scheduler, network, pictures, latents, inpainting, dtype)
    verdict = judge("latents", got, *wanted.values())
    assert verdict.passed, verdict
