"""A network reads every attribute of diffusers' modules that diffusers' code reads, and notices
changes of each."""

import copy
import warnings
from collections.abc import Mapping

import pytest
import torch
from diffusers.models.attention_processor import Attention
from small import NETS, unet
from torch import nn

from fastdiff.compiler.slot import slot_of
from fastdiff.families import settings
from fastdiff.models.originals import reached

UNREAD = {
    # used only under gradients, where the module's own call runs
    "_gradient_checkpointing_func",
    "gradient_checkpointing",
    # splits the computation without changing the result
    "_chunk_dim",
    "_chunk_size",
    # for FreeU, which is recognised by s1 to b2
    "resolution_idx",
    # for inputs other than pictures
    "is_input_patches",
    "is_input_vectorized",
    "use_additional_conditions",
    # whether the input is overwritten
    "inplace",
    # set by fastdiff
    "_compiled_call_impl",
    # for padding other than zeros
    "_reversed_padding_repeated_twice",
    # for projections of the text other than IP-Adapters'
    "only_cross_attention",
}
"""Attributes whose names occur in diffusers' code, but which change nothing in these networks."""
OTHERS = {
    # read by other processors or classes; the last block of a ControlNet does not return the text;
    # without attn2 norm2 is not used
    "Attention": {"dropout", "scale", "context_pre_only"},
    "BasicTransformerBlock": {"dim", "dropout", "num_attention_heads", "norm2"},
    "GroupNorm": {"num_channels"},
    "Conv2d": {"out_channels"},
    "ResnetBlock2D": {"out_channels"},
    "Upsample2D": {"out_channels"},
    "Downsample2D": {"out_channels", "name"},
    "Transformer2DModel": {"out_channels", "_internal_dict"},
    "UNetMidBlock2DCrossAttn": {"out_channels"},
    # for positions that are computed anew, which is refused
    "PatchEmbed": {"base_size", "height", "width", "interpolation_scale"},
    "JointTransformerBlock": {"attn2"},  # not used unless use_dual_attention
    "RMSNorm": {"dim"},
    "SD3ControlNetModel": {"_internal_dict"},
    "FluxAttention": {"dropout"},
    "FluxTransformer2DModel": {"_internal_dict"},
    "Flux2Attention": {"dropout", "inner_dim"},
    "Flux2ParallelSelfAttention": {"dropout"},
    "Flux2TransformerBlock": {"mlp_hidden_dim"},
    "Flux2Transformer2DModel": {"_internal_dict"},
    "PriorTransformer": {"num_attention_heads"},  # read from its config
    "DiTTransformer2DModel": {"height", "width", "_internal_dict"},
    "PixArtTransformer2DModel": {"height", "width"},
    "AuraFlowTransformer2DModel": {"out_channels"},  # read from its config
    # for a network that takes reference pictures, or read from its embedding of positions
    "ZImageTransformer2DModel": {
        *("siglip_pad_token", "siglip_refiner", "_internal_dict", "axes_dims", "axes_lens"),
    },
    "ZImageTransformerBlock": {"dim"},
    "QwenImageTransformer2DModel": {"_internal_dict"},
    "QwenImageTransformerBlock": {"dim"},
    "LabelEmbedding": {"num_classes"},  # for labels that are dropped in training
    # used only to make their attentions, or read from the first weight
    "SimpleCrossAttnDownBlock2D": {"num_heads"},
    "UNetMidBlock2DSimpleCrossAttn": {"num_heads"},
    "SimpleCrossAttnUpBlock2D": {"num_heads"},
    "AttentionPooling": {"dtype"},
    "Embedding": {"norm_type", "padding_idx", "scale_grad_by_freq", "sparse"},
    "SD3IPAdapterJointAttnProcessor2_0": {"scale"},  # read at every use
}
"""More such attributes, by class."""
TEXT = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"}
"""What an attention with a text reads."""


def returns_text(attention):
    """Whether an attention gets a text and returns its result for it."""
    return attention.added_kv_proj_dim is not None and not attention.context_pre_only


def others(value):
    """Other values of the same type."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value * 2, value + 1, max(1, value // 2)]
        case float():
            return [value * 2, value + 0.5]
        case str():
            return ["circular", "scale_shift", "layer_norm_i2vgen", "text", "bgr", "rgb", "conv"]
        case tuple():
            return [tuple(side + 1 for side in value), tuple(2 * side for side in value)]
        case None:
            return [True, 2, nn.Tanh(), torch.ones(1)]
        case nn.Parameter():
            return [nn.Parameter(1.5 * value.detach().clone())]
        case nn.Module():
            return [Doubled(value), None, doubled(value)]
        case Mapping():
            return [dict(value)]
    return [None]


class Doubled(nn.Module):
    """A user's module, which doubles the result of another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given, **options):
        return self.inner(*given, **options) * 2

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def doubled(module):
    other = copy.deepcopy(module)
    for weight in other.parameters():
        weight.data = weight.data * 1.5
    return other


def results(call):
    """The tensors that a call returns, or the type of its error."""
    torch.manual_seed(0)  # a label may be dropped at random
    try:
        out = call()
    except Exception as error:  # of diffusers or torch
        return type(error)
    out = out if isinstance(out, tuple) else (out,)
    flat = [t for part in out for t in (part if isinstance(part, list | tuple) else [part])]
    return [t.sample if hasattr(t, "sample") and not torch.is_tensor(t) else t for t in flat]


@torch.no_grad()
@pytest.mark.parametrize("every", [pytest.param(True, id="all", marks=pytest.mark.product), False])
def test_a_change_of_anything_read_is_noticed(compiled, every, request):
    """Each attribute is set to other values. `make test` tries every third attribute of a network,
    with one value; neither is the same in all networks."""
    at = [*NETS].index(request.node.callspec.params["compiled"])
    net, given, options = compiled
    seen = {}
    options = options | ({} if len(given) == 1 else {"return_dict": False})
    slot = slot_of(net)
    for thing, name, value in slot.loan.values:
        seen.setdefault((type(thing).__qualname__, name), (thing, value))
    assert len(seen) > 40
    before = results(lambda: net._call_impl(*given, **options))
    moved = 0
    chosen = slice(None) if every else slice(at % 3, None, 3)
    for (kind, name), (thing, value) in list(seen.items())[chosen]:
        there = hasattr(thing, name)
        values = others(value)
        for other in values if every else [values[at % len(values)]]:
            try:
                setattr(thing, name, other)
            except (TypeError, AttributeError):  # a user cannot set it either
                continue
            wanted = results(lambda: net._call_impl(*given, **options))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                found = results(lambda: net(*given, **options))
            setattr(thing, name, value) if there else delattr(thing, name)
            where = f"{kind}.{name}: {value!r:.40} -> {other!r:.40}"
            if isinstance(wanted, type):
                assert isinstance(found, type), where
                continue
            assert not isinstance(found, type), f"{where}: {found}"
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=where)
            moved += any(
                a.shape != b.shape or not torch.allclose(a, b, atol=1e-3)
                for a, b in zip(wanted, before, strict=True)
            )
    assert moved > (20 if every else 0)  # diffusers refuses many of the values
    fast = slot.fast
    net(*given, **options)
    assert slot.fast == fast + 1, slot.refused


@torch.no_grad()
def test_every_attribute_that_diffusers_reads_is_read(compiled):
    net, _, _ = compiled
    slot = slot_of(net)
    opened = list(slot.loan.opened.values())
    read = {(id(thing), name) for thing, name, _ in slot.loan.values}
    names = reached(map(type, opened)).names
    plain = vars(nn.Module()).keys()
    missed = {
        (type(thing).__name__, name)
        for thing in opened
        for name in (vars(thing).keys() & names) - plain
        if (id(thing), name) not in read and name not in UNREAD
        if name not in TEXT or type(thing) is not Attention or returns_text(thing)
    }
    assert {(kind, name) for kind, name in missed if name not in OTHERS.get(kind, ())} == set()


def test_settings_are_what_is_read():
    """A copy of a network has equal settings; a network with another attribute has others."""
    net, _, _, _ = unet("sd15")
    first = settings(net)
    assert ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "heads", 4) in first
    assert ("time_proj", "scale", 1) in first
    assert ("_internal_dict", "center_input_sample", False) in first
    assert settings(copy.deepcopy(net)) == first
    net.time_proj.downscale_freq_shift = 1
    assert settings(net) != first
