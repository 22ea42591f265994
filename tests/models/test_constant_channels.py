"""U-Nets of upscalers against diffusers in float64: channels that are the same in every step, class
embeddings, and transformers whose first attention reads the text, too."""

import copy

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from small import TINY, noisy

import fastdiff
from fastdiff.models import Loan, Unsupported, borrow_picture_unet, borrow_unet
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import denoiser

X4 = TINY | {
    "block_out_channels": (16, 32),
    "in_channels": 7,
    "only_cross_attention": (True, False),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "num_class_embeds": 9,
    "use_linear_projection": True,
}


class Eager(torch.nn.Module):
    """Joins latents and constant channels in every call, as pipelines do, and repeats both for each
    text."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, constant, text, labels=None, mask=None):
        both = (part.repeat(len(text) // len(part), 1, 1, 1) for part in (sample, constant))
        more = {} if mask is None else {"encoder_attention_mask": mask}
        return self.unet(torch.cat([*both], dim=1), 7, text, class_labels=labels, **more)[0]


def planned(network):
    """A step as a plan runs it: the constant channels are hoisted, and both halves of guidance
    share the latents."""

    def run(sample, constant, text, labels=None, mask=None):
        net = network.network
        given = Conditions(
            text, class_labels=labels, constant_channels=constant, encoder_attention_mask=mask
        )
        net.check(sample, given, len(text) // len(sample))
        rows, constants = net.hoist(given, torch.tensor([[7]]), sample.shape[2:])
        made = net.predict(net.pack(sample).contiguous(), rows[0], constants)
        return net.unpack(made, sample.shape[2:])

    return run


@pytest.mark.parametrize(
    ("shape", "texts", "constants", "labels", "dtype"),
    [
        ((1, 8, 8), 1, 1, 1, torch.float32),
        ((3, 9, 5), 3, 3, 3, torch.float32),
        # guided: the halves share the constant channels and the label
        ((1, 7, 12), 2, 1, 1, torch.bfloat16),
        ((2, 6, 5), 4, 2, 1, torch.float32),
        ((2, 8, 8), 4, 4, 4, torch.float32),  # guided, with other channels and labels in each half
    ],
)
def test_steps(shape, texts, constants, labels, dtype, budget):
    eager = noisy(UNet2DConditionModel(**X4)).to(dtype)
    module = copy.deepcopy(eager)
    batch, rows, columns = shape
    mask = (torch.arange(6) < torch.arange(3, 3 + texts)[:, None]).to(dtype)
    budget(
        planned(denoiser(borrow_unet(module, Loan(module)))),
        Eager(eager),
        torch.randn(batch, 4, rows, columns, dtype=dtype),
        torch.randn(constants, 3, rows, columns, dtype=dtype),
        torch.randn(texts, 6, 24, dtype=dtype),
        torch.arange(labels) + 2,
        mask=mask if texts == 3 else None,
    )


def test_without_a_text(budget):
    config = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    eager = noisy(UNet2DModel(**config, **blocks, in_channels=6))
    module = copy.deepcopy(eager)
    network = denoiser(borrow_picture_unet(module, Loan(module)))

    class Joined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = eager

        def forward(self, sample, constant):
            return self.unet(torch.cat([sample, constant], dim=1), 7)[0]

    def run(sample, constant):
        return network(sample, torch.tensor(7), Conditions(constant_channels=constant))

    budget(run, Joined(), torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12))


@torch.no_grad()
def test_single_calls_with_a_label(budget):
    """The module's own call takes all channels at once, and a label for each picture or for all."""
    unet = noisy(UNet2DConditionModel(**X4))
    eager = copy.deepcopy(unet)
    fastdiff.compile(unet)
    sample, text = torch.randn(2, 7, 8, 8), torch.randn(2, 6, 24)
    for labels in ([3, 8], [5]):
        given = {"class_labels": torch.tensor(labels), "return_dict": False}
        budget(unet, eager, sample, torch.tensor(7), text, **given)
    for wrong in (None, torch.tensor([[1], [2]]), torch.tensor([0.5, 1.0])):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            eager(sample, 7, text, class_labels=wrong)
        with pytest.warns(RuntimeWarning, match="class_labels"), pytest.raises(theirs.type):
            unet(sample, 7, text, class_labels=wrong)


def borrowed(**config):
    module = noisy(UNet2DConditionModel(**X4 | config))
    return borrow_unet(module, Loan(module))


def test_wrong_configs_and_channels_are_refused():
    for reason, config in {
        "type 'simple_projection'": {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 8,
        },
        "beside the time": {"class_embeddings_concat": True},
    }.items():
        with pytest.raises(Unsupported, match=reason):
            borrowed(**config)
    net, latents = borrowed(), torch.randn(2, 4, 8, 8)
    text, labels = torch.randn(4, 6, 24), torch.tensor([3])
    for reason, channels in {
        r"\[2, 7, 8, 8\] of 7": torch.randn(2, 7, 8, 8),  # none would be left for the latents
        r"\[2, 3, 4, 8\] for latents": torch.randn(2, 3, 4, 8),
        r"\[3, 3, 8, 8\] for latents": torch.randn(3, 3, 8, 8),
        "torch.float64 on": torch.randn(2, 3, 8, 8).double(),
        "expected 5 channels": torch.randn(2, 2, 8, 8),
    }.items():
        given = Conditions(text, class_labels=labels, constant_channels=channels)
        with pytest.raises(Unsupported, match=reason):
            net.check(latents, given, copies=2)


@torch.no_grad()
def test_a_controlnet_with_class_embeddings(budget):
    config = {key: value for key, value in TINY.items() if not key.startswith(("up", "sample"))}
    net = noisy(ControlNetModel(**config, num_class_embeds=3))
    eager = copy.deepcopy(net)
    fastdiff.compile(net)
    given = (torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 6, 24))
    picture, labels = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])

    class Middle(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, *given):
            return self.net(*given, class_labels=labels, return_dict=False)[1]

    budget(Middle(net), Middle(eager), *given, picture)
