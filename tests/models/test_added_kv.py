"""U-Nets whose pixels attend to the text and to each other in one attention, and their conditions,
against diffusers in float64 at reduced widths."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from small import IF, KANDINSKY21, KANDINSKY22, SIMPLE, noisy

from fastdiff.families.unet import UNET
from fastdiff.models import Loan, Unsupported, borrow_unet
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import denoiser
from fastdiff.runtime.recordings import first_of

TWO_LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "out_channels": 8,
}
"""Two levels, as in the published networks, and output channels for the variance."""
# the config of each network, and the widths of its conditions
KINDS = {
    "plain": ({}, {"text": 32}),
    "text alone": ({"only_cross_attention": True}, {"text": 32}),
    "labels of Stable unCLIP": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"text": 32, "class_labels": 12},
    ),
    "IF": (IF, {"text": 24}),
    "Kandinsky 2.2": (KANDINSKY22, {"image_embeds": 20}),
    "two-level unCLIP": (
        TWO_LEVELS | {"class_embed_type": "identity"},
        {"text": 32, "class_labels": 64},
    ),
    "two-level IF": (
        TWO_LEVELS
        | IF
        | {
            "act_fn": "gelu",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 2**0.5,
            "mid_block_scale_factor": 2**0.5,
            "class_embed_type": "timestep",  # of stage II
        },
        {"text": 24, "class_labels": 0},
    ),
    "two-level Kandinsky 2.2": (TWO_LEVELS | KANDINSKY22, {"image_embeds": 20}),
    "Kandinsky 2.1": (KANDINSKY21, {"text": 24, "image_embeds": 32, "text_embeds": 32}),
}
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])


def network_of(eager):
    mine = copy.deepcopy(eager)
    return denoiser(borrow_unet(mine, Loan(mine)))


def made(name, dtype=torch.float32):
    return noisy(UNet2DConditionModel(**SIMPLE | KINDS[name][0])).to(dtype)


def conditions_of(name, batch, dtype=torch.float32):
    """Random values for the arguments of `Conditions`. A label of width 0 is a timestep."""
    lengths = {"text": (5,)}
    given = {
        key: torch.randn(batch, *lengths.get(key, ()), width, dtype=dtype)
        if width
        else torch.arange(7, 7 + batch)
        for key, width in KINDS[name][1].items()
    }
    return {"encoder_hidden_states": given.pop("text", None), **given}


class Eager(torch.nn.Module):
    """Repeats the latents, as guidance does, if there are more conditions than latents; casts the
    conditions to the dtype of the latents."""

    def __init__(self, unet, given, **options):
        super().__init__()
        self.unet, self.given, self.options = copy.deepcopy(unet), given, options

    def forward(self, sample, count):
        def cast(value):
            return value if value is None or not value.dtype.is_floating_point else value.to(sample)

        given = {key: cast(value) for key, value in self.given.items()}
        text, labels = given.pop("encoder_hidden_states"), given.pop("class_labels", None)
        sample = torch.cat([sample] * (count // len(sample)))
        more = {"class_labels": labels, "added_cond_kwargs": given or None} | self.options
        return self.unet(sample, 301, text, **more).sample


def predicted(network, sample, given, copies):
    """The predictions as the denoising loop calls for them, one for each text."""
    network.check(sample, given, copies)
    sides = sample.shape[2:]
    rows, constants = network.hoist(given, torch.tensor([[301]]), sides)
    x = network.predict(network.pack(sample).contiguous(), first_of(rows), constants)
    return network.unpack(x, sides)


def hold(budget, eager, name, shape, copies=1, dtype=torch.float32):
    """Check that one prediction is inside the budget."""
    network = network_of(eager).network
    given = conditions_of(name, shape[0] * copies, dtype)
    run = lambda sample, count: predicted(network, sample, Conditions(**given), copies)  # noqa: E731
    sample = torch.randn(shape[0], 4, *shape[1:], dtype=dtype)
    budget(run, Eager(eager, given), sample, shape[0] * copies)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 2, 6)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_predictions(name, shape, budget):
    hold(budget, made(name), name, shape)


@pytest.mark.parametrize("name", ["plain", "text alone", "IF"])
def test_odd_sizes(name, budget):
    """These networks have no resnet that enlarges the picture."""
    hold(budget, made(name), name, (2, 7, 5))


def test_odd_sizes_of_two_levels(budget):
    """A convolution halves the picture and rounds up. With a mask, a text of as many tokens as
    a level has pixels is refused; diffusers fails."""
    levels = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    eager, mask = noisy(UNet2DConditionModel(**SIMPLE | levels)), {"attention_mask": MASK}
    network, given = network_of(eager), conditions_of("plain", 3)

    def run(sample, count):
        return UNET.call(network, sample, 301, given["encoder_hidden_states"], **mask).sample

    budget(run, Eager(eager, given, **mask), torch.randn(3, 4, 7, 5), 3)
    with pytest.raises(Unsupported, match=r"for 5 tokens beside \[9, 5\] pixels"):
        run(torch.randn(3, 4, 9, 1), 3)
    with pytest.raises(RuntimeError):
        Eager(eager, given, **mask)(torch.randn(3, 4, 9, 1), 3)


@pytest.mark.parametrize("name", KINDS)
def test_guided_pairs(name, budget):
    hold(budget, made(name), name, (2, 6, 10), copies=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["two-level unCLIP", "two-level IF", "two-level Kandinsky 2.2"])
def test_other_dtypes(name, dtype, budget):
    hold(budget, made(name, dtype), name, (2, 8, 8), dtype=dtype)


@pytest.mark.parametrize("mask", ["attention_mask", "encoder_attention_mask"])
def test_masks(mask, budget):
    """unCLIP passes the text's mask as `attention_mask`, which in other networks masks pixels."""
    eager, options = made("plain"), {mask: MASK}
    network, given = network_of(eager), conditions_of("plain", 3)

    def run(sample, count):
        return UNET.call(network, sample, 301, given["encoder_hidden_states"], **options).sample

    budget(run, Eager(eager, given, **options), torch.randn(3, 4, 7, 6), 3)


def test_the_classic_processor(budget):
    """Its softmax is float32 in every dtype, so the reference is the 2.0 processor in float64."""
    eager = made("plain")
    classic = copy.deepcopy(eager)
    classic.set_attn_processor(AttnAddedKVProcessor())
    network, given = network_of(classic), conditions_of("plain", 2)
    run = lambda sample, count: network(sample, 301, Conditions(**given))  # noqa: E731
    budget(run, Eager(eager, given), torch.randn(2, 4, 8, 8), 2)


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("IF", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
        ("two-level unCLIP", {"class_labels": None}, "class_labels are missing"),
        (
            "two-level unCLIP",
            {"class_labels": torch.zeros(1, 9)},
            r"\[1, 9\]; expected 64 channels",
        ),
        (
            "two-level unCLIP",
            {"class_labels": torch.zeros(3, 64)},
            r"\[3, 64\]; expected one embedding or 1",
        ),
        ("two-level IF", {"class_labels": torch.zeros(1, 1)}, r"\[1, 1\]; expected one label or 1"),
        ("plain", {"class_labels": torch.zeros(1)}, "it was given class_labels"),
        ("two-level unCLIP", {"side": (7, 8)}, r"\(7, 8\), which are not multiples of 2"),
        ("Kandinsky 2.2", {"image_embeds": [torch.zeros(1, 20)]}, "image_embeds is a list"),
        ("Kandinsky 2.2", {"image_embeds": torch.zeros(2, 20)}, "image_embeds is for 2 pictures"),
        ("Kandinsky 2.2", {"image_embeds": torch.zeros(1, 9)}, r"\[1, 9\]; expected 20 channels"),
        ("plain", {"encoder_attention_mask": MASK[:2]}, r"a text mask of \[2, 5\]"),
        # diffusers does not extend a mask that is as long as there are pixels, and fails
        ("plain", {"encoder_attention_mask": MASK[:1], "side": (5, 1)}, r"beside \[5\] pixels"),
        ("text alone", {"encoder_attention_mask": MASK[:1]}, "attend to the text alone"),
        ("plain", {"down_intrablock_additional_residuals": []}, "T2I-Adapter residuals"),
    ],
    ids=str,
)
def test_wrong_conditions_are_refused(name, given, why):
    sides, network = given.get("side", (8, 8)), network_of(made(name))
    given = conditions_of(name, 1) | {key: value for key, value in given.items() if key != "side"}
    with pytest.raises(Unsupported, match=why), torch.no_grad():
        network(torch.randn(1, 4, *sides), 301, Conditions(**given))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"addition_embed_type": "image_hint", "encoder_hid_dim": 8}, "'image_hint'"),
        ({"cross_attention_norm": "layer_norm"}, "LayerNorm"),
        ({"time_embedding_act_fn": "mish"}, "other than SiLU"),
        (
            {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 8},
            "'simple",
        ),
        ({"class_embed_type": "identity", "class_embeddings_concat": True}, "beside the time"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "UNetMidBlock2DCrossAttn"),
    ],
    ids=str,
)
def test_other_architectures_are_refused(more, why):
    module = UNet2DConditionModel(**SIMPLE | more).eval()
    with pytest.raises(Unsupported, match=why):
        borrow_unet(module, Loan(module, rehearsal=True))
