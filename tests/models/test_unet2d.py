"""U-Nets without a text against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from small import noisy

import fastdiff
from fastdiff.models import Loan, Unsupported, borrow_picture_unet
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import denoiser

PLAIN = {
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
ADM = {
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
"""The config of ADM and of consistency models."""
KINDS = {
    "diffusers' defaults": {},
    "DDPM's": {
        "attention_head_dim": None,  # one head
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "no attention in the middle": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "six channels in, other groups": {"in_channels": 6, "attn_norm_num_groups": 4},
    "ADM's": ADM,
    "a middle without a norm": ADM | {"attn_norm_num_groups": None},
    "a scaled middle of GELUs": {
        "act_fn": "gelu",
        "mid_block_scale_factor": 2.0**0.5,
        "add_attention": False,
    },
}


def network_of(module):
    return denoiser(borrow_picture_unet(module, Loan(module)))


def given(module, batch, rows, columns, dtype=torch.float32):
    return torch.randn(batch, module.config.in_channels, rows, columns, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 12, 20), (3, 4, 28)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions(kind, shape, budget):
    eager = noisy(UNet2DModel(**PLAIN | KINDS[kind]))
    network = network_of(copy.deepcopy(eager))
    run = lambda sample, timestep: network(sample, timestep, Conditions())  # noqa: E731
    budget(run, eager, given(eager, *shape), torch.tensor(301))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, budget):
    eager = noisy(UNet2DModel(**PLAIN)).to(dtype)
    network = network_of(copy.deepcopy(eager))
    run = lambda sample, timestep: network(sample, timestep, Conditions())  # noqa: E731
    budget(run, eager, given(eager, 2, 8, 12, dtype), torch.tensor(301))


def test_a_timestep_for_each_picture(budget):
    eager = noisy(UNet2DModel(**PLAIN))
    network = network_of(copy.deepcopy(eager))
    run = lambda sample, timestep: network(sample, timestep, Conditions())  # noqa: E731
    budget(run, eager, given(eager, 3, 8, 8), torch.tensor([999, 500, 1]))


LABELS = {
    "a table": ({"num_class_embeds": 10}, lambda: torch.tensor([3, 0])),
    "timesteps": ({"class_embed_type": "timestep"}, lambda: torch.tensor([7.0, 900.0])),
    "embeddings": ({"class_embed_type": "identity"}, lambda: torch.randn(2, 64)),
}


class Cast(torch.nn.Module):
    """Sinusoids in the dtype of the weights. diffusers does not cast those of labels, so its own
    network does not run in float64."""

    def __init__(self, time_proj):
        super().__init__()
        self.time_proj = time_proj
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, timesteps):
        return self.time_proj(timesteps).to(self.weight.dtype)


@pytest.mark.parametrize("kind", LABELS)
def test_class_labels(kind, budget):
    more, labels = LABELS[kind]
    eager = noisy(UNet2DModel(**PLAIN | ADM | more))
    network = network_of(copy.deepcopy(eager))
    eager.time_proj = Cast(eager.time_proj)

    def run(sample, timestep, labels):
        return network(sample, timestep, Conditions(class_labels=labels))

    budget(run, eager, given(eager, 2, 8, 8), torch.tensor(301), labels())
    with pytest.raises(Unsupported, match="class_labels are missing"):
        run(given(eager, 2, 8, 8), torch.tensor(301), None)


def test_timesteps_as_labels_in_half_precision_are_refused():
    """diffusers gives float32 sinusoids to half-precision weights, which torch refuses."""
    module = UNet2DModel(**PLAIN | {"class_embed_type": "timestep"}).eval().half()
    with pytest.raises(Unsupported, match="class embeddings of timesteps in torch.float16"):
        borrow_picture_unet(module, Loan(module, rehearsal=True))


def test_heads_that_do_not_fill_the_channels(budget):
    """20 channels are 2 heads of 8 columns, from 16 columns back to 20."""
    config = PLAIN | {"block_out_channels": (20, 20, 20), "norm_num_groups": 4}
    eager = noisy(UNet2DModel(**config))
    network = network_of(copy.deepcopy(eager))
    run = lambda sample, timestep: network(sample, timestep, Conditions())  # noqa: E731
    budget(run, eager, given(eager, 2, 8, 8), torch.tensor(5))


def test_sizes_that_diffusers_cannot_draw():
    """In diffusers the two halves of the U-Net would have different sizes; our network could
    compute them."""
    module = UNet2DModel(**PLAIN).eval()
    network = network_of(copy.deepcopy(module))
    sample = given(module, 1, 6, 8)
    with pytest.raises(RuntimeError), torch.no_grad():
        module(sample, 5)
    with pytest.raises(Unsupported, match=r"latents of \(6, 8\), which are not multiples of 4"):
        network(sample, 5, Conditions())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"center_input_sample": True}, "center_input_sample"),
        ({"time_embedding_type": "fourier"}, "GaussianFourierProjection"),
        ({"mid_block_scale_factor": 2.0}, "rescale_output_factor other than 1"),
    ],
    ids=str,
)
def test_other_architectures_are_refused(more, why):
    module = UNet2DModel(**PLAIN | more).eval()
    with pytest.raises(Unsupported, match=why):
        borrow_picture_unet(module, Loan(module, rehearsal=True))


def test_a_fractional_timestep_becomes_an_integer_as_in_diffusers(budget):
    eager = noisy(UNet2DModel(**PLAIN))
    ours = fastdiff.compile(copy.deepcopy(eager))
    x = given(eager, 2, 8, 8)
    budget(lambda sample, timestep: ours(sample, timestep).sample, eager, x, 3.7)


@pytest.mark.parametrize("timestep", [torch.tensor([1, 2]), torch.ones(3, 1)])
def test_timesteps_that_do_not_fit_are_left_to_diffusers(timestep):
    eager = noisy(UNet2DModel(**PLAIN))
    with pytest.raises(Unsupported, match="timesteps .* for 3 latents"):
        network_of(eager)(given(eager, 3, 8, 8), timestep, Conditions())


def test_an_inplace_activation_is_noticed(budget):
    """Also if it is set after compiling: the next resnets would get an activated time embedding."""
    eager = noisy(UNet2DModel(**PLAIN))
    ours = fastdiff.compile(copy.deepcopy(eager))
    for net in (eager, ours):
        net.down_blocks[0].resnets[0].nonlinearity.inplace = True
    x, step = given(eager, 1, 8, 8), torch.tensor(5)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="overwrites its input"):
        assert torch.equal(ours(x, step).sample, eager(x, step).sample)
