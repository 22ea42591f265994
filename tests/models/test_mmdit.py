"""SD3's transformer and ControlNets against diffusers in float64: its blocks at reduced widths."""

import copy
from importlib import import_module

import pytest
import torch
from covered import covered
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from small import noisy
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastdiff.bench.graph import launched
from fastdiff.kernels.contract import judge
from fastdiff.kernels.dispatch import all_kernels
from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.guided_step.spec import HISTORY
from fastdiff.models import (
    Loan,
    MMDiTConditions,
    MMDiTControl,
    MMDiTControlConditions,
    Unsupported,
    borrow,
    borrow_mmdit,
    borrow_mmdit_control,
)
from fastdiff.models.joint_trunk import alike
from fastdiff.runtime.tape import record

SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
}
PICTURES = "ip_adapter_image_embeds"
KINDS = {
    "sd3": {},
    "sd35-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd35-large": {"qk_norm": "rms_norm"},
}
# batch, rows, columns; rows and columns beyond the last whole patch are dropped
SHAPES = ((1, 16, 16), (2, 10, 24), (3, 9, 13), (1, 2, 3))
DTYPES = (torch.float32, torch.bfloat16)
TIMES = torch.tensor([[999.0], [321.7], [20.5]])


class Exact(nn.Module):
    """RMSNorm in the dtype of its input; diffusers' computes the mean square in float32 always."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def exact(module):
    """A copy in float64."""
    module = copy.deepcopy(module).double()
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, RMSNorm):
                setattr(parent, name, Exact(child))
    return module


def transformer(kind, dtype=torch.float32, **more):
    torch.manual_seed(1)
    return noisy(SD3Transformer2DModel(**SMALL | KINDS[kind] | more)).to(dtype)


def conditions(count, dtype=torch.float32, tokens=7, **more):
    return MMDiTConditions(
        torch.randn(count, tokens, 40).to(dtype), torch.randn(count, 24).to(dtype), **more
    )


def doubled(tree):
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, tree)


def at(rows, step):
    return tree_map(lambda leaf: leaf[step] if isinstance(leaf, Tensor) else leaf, rows)


def by_diffusers(module, latents, times, given, copies=1):
    """The step at `times` [n], called as diffusers' loop calls it."""
    names = given._asdict()
    for ours in ("last_skip_layers", "repeats"):  # for a third prediction in the same batch
        names.pop(ours, None)
    image = names.pop("ip_adapter_image_embeds", None)
    more = {} if image is None else {"joint_attention_kwargs": {"ip_adapter_image_embeds": image}}
    return module(
        torch.cat([latents] * copies),
        timestep=times.expand(len(latents)).repeat(copies),
        **names,
        **more,
        return_dict=False,
    )[0]


def by_us(network, latents, times, given, copies=1, step=1):
    """Our prediction for the step number `step` of `times`, hoisted with the other steps."""
    network.check(latents, given, copies)
    sides = latents.shape[2:]
    hoisted = network.hoist(given, times, sides)
    row = at(hoisted.rows, step)
    x = network.pack(latents)
    predicted = network.predict(x, row, hoisted.constants)
    if isinstance(network, MMDiTControl):
        return predicted
    assert predicted.shape[1:] == x.shape[1:]
    unpacked = network.unpack(predicted, sides)
    assert unpacked.is_contiguous()
    return unpacked


def hold(module, latents, given, copies=1, times=TIMES, network=None):
    """Check that our prediction is within the error budget of diffusers' own, and return it."""
    with torch.no_grad():
        truth = by_diffusers(exact(module), latents.double(), times[1], doubled(given), copies)
        eager = by_diffusers(copy.deepcopy(module), latents, times[1], given, copies)
        network = borrow_mmdit(module, Loan(module)) if network is None else network
        got = by_us(network, latents, times, given, copies)
    verdict = judge("prediction", got, eager, truth)
    assert verdict.passed, verdict
    return got


@pytest.mark.parametrize(("kind", "shape", "dtype"), covered(KINDS, SHAPES, DTYPES))
def test_predictions(kind, shape, dtype):
    batch, *sides = shape
    latents = torch.randn(batch, 4, *sides).to(dtype)
    hold(transformer(kind, dtype), latents, conditions(batch, dtype))


@pytest.mark.parametrize(
    ("kind", "batch", "dtype"), covered(KINDS, [1, 3], [*DTYPES, torch.float16])
)
def test_guidance(kind, batch, dtype):
    latents = torch.randn(batch, 4, 12, 8).to(dtype)
    hold(transformer(kind, dtype), latents, conditions(2 * batch, dtype), copies=2)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_it_is_the_same_function(kind):
    module = transformer(kind, torch.float64)
    controls = tuple(torch.randn(2, 24, 48).double() for _ in range(2))
    given = doubled(conditions(2))._replace(
        skip_layers=(2,), block_controlnet_hidden_states=controls
    )
    latents = torch.randn(1, 4, 8, 12).double()
    with torch.no_grad():
        truth = by_diffusers(exact(module), latents, TIMES[1], given, 2)
        got = by_us(borrow_mmdit(module, Loan(module)), latents, TIMES, given, 2)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-13 * float(truth.abs().max()))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_other_patches_and_channels(size):
    module = transformer("sd3", patch_size=size, in_channels=9, out_channels=5)
    network = borrow_mmdit(module, Loan(module))
    latents, given = torch.randn(2, 9, 7, 12), conditions(2)
    eager = by_diffusers(module, latents, TIMES[1], given)
    hoisted = network.hoist(given, TIMES, (7, 12))
    got = network.predict(network.pack(latents), at(hoisted.rows, 1), hoisted.constants)
    torch.testing.assert_close(network.unpack(got, (7, 12)), eager, rtol=1e-4, atol=1e-4)


def test_a_timestep_for_each_picture():
    latents, times = torch.randn(3, 4, 8, 8), torch.rand(3, 3) * 999
    for copies in (1, 2):
        hold(transformer("sd3"), latents, conditions(3 * copies), copies, times)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_at_the_end_of_the_text_are_merged(kind):
    given = conditions(2, tokens=40)
    text = given.encoder_hidden_states
    text[:, 6:] = 0
    module = transformer(kind)
    latents = torch.randn(1, 4, 12, 8)
    hold(module, latents, given, copies=2)
    constants = borrow_mmdit(module, Loan(module)).hoist(given, TIMES, (12, 8)).constants
    assert constants.text.shape[1] == 7
    torch.testing.assert_close(constants.text_bias, torch.tensor([1.0] * 6 + [34]).log())


def test_equal_tokens_are_counted_in_every_sample():
    text = torch.randn(3, 9, 5)
    assert alike(text) == 1
    text[0, 4:], text[1, 2:], text[2, 6:] = 1, 2, 3
    assert alike(text) == 3
    assert alike(torch.zeros(2, 9, 5)) == 9
    assert alike(torch.full((1, 4, 2), float("nan"))) == 1


@pytest.mark.parametrize("skipped", [(1, 2), (0,), (3,), (2, 3), (0, 1, 2, 3), (7,)], ids=str)
@pytest.mark.parametrize("kind", ["sd3", "sd35-medium"])
def test_skipped_layers(kind, skipped):
    hold(transformer(kind), torch.randn(2, 4, 8, 8), conditions(2, skip_layers=skipped))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_control_residuals(count):
    controls = tuple(torch.randn(2, 24, 48) for _ in range(count))
    given = conditions(2, block_controlnet_hidden_states=controls)
    hold(transformer("sd35-medium"), torch.randn(1, 4, 8, 12), given, copies=2)
    hold(transformer("sd3"), torch.randn(2, 4, 8, 12), given._replace(skip_layers=(0, 2)))


def with_ip_adapter(module):
    """Put an IP-Adapter into every attention, with the scales 0, 0.5, 1, ... in turn."""
    width, heads = module.inner_dim, module.config.num_attention_heads
    head = width // heads
    module.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(width, width, head, 32, scale=0.5 * (i % 4))
            for i, name in enumerate(module.attn_processors)
        }
    )
    module.image_proj = IPAdapterTimeImageProjection(
        20, width, hidden_dim=32, depth=2, dim_head=8, heads=4, num_queries=5, timestep_in_dim=16
    )
    dtype = module.dtype
    return noisy(module).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ip_adapter(kind, dtype):
    module = with_ip_adapter(transformer(kind, dtype))
    given = conditions(2, dtype, ip_adapter_image_embeds=torch.randn(2, 6, 20).to(dtype))
    network = borrow_mmdit(module, loan := Loan(module))
    latents = torch.randn(1, 4, 8, 12).to(dtype)
    first = hold(module, latents, given, copies=2, network=network)
    for block in module.transformer_blocks:
        block.attn.processor.scale = 1.5 - block.attn.processor.scale
    second = hold(module, latents, given, copies=2, network=network)
    without = hold(
        module, latents, given._replace(ip_adapter_image_embeds=None), copies=2, network=network
    )
    assert loan.intact()
    assert (first - second).abs().max() > 0.01
    assert (without - second).abs().max() > 0.01


def controlled(kind, dtype=torch.float32, **more):
    config = SMALL | {"num_layers": 3, "extra_conditioning_channels": 1} | more
    if kind == "sd35-large, its own":
        config |= {"joint_attention_dim": None, "use_pos_embed": False}
    else:
        config |= KINDS[kind]
    torch.manual_seed(2)
    return noisy(SD3ControlNetModel(**config)).to(dtype)


@pytest.mark.parametrize(
    ("kind", "positions", "dtype"),
    covered([*KINDS, "sd35-large, its own"], [True, False], DTYPES),
)
def test_controlnet(kind, positions, dtype):
    module = controlled(kind, dtype)
    patched = module.pos_embed is not None
    if kind == "sd35-large, its own" and positions:  # as the pipeline does it
        shared = module._get_pos_embed_from_transformer(transformer("sd3", dtype))
        module.pos_embed = shared.to(dtype)
        patched = True
    elif not positions and patched:
        module.pos_embed.pos_embed = None
    latents = torch.randn((1, 4, 8, 12) if patched else (1, 24, 48)).to(dtype)
    text, pooled, *_ = conditions(2, dtype, tokens=9)
    text[:, 5:] = 0.5
    given = MMDiTControlConditions(
        None if module.context_embedder is None else text,
        pooled,
        torch.randn(2, 5, 8, 12).to(dtype),
    )

    def run(module, latents, given):
        return torch.stack(by_diffusers(module, latents, TIMES[1], given, 2))

    with torch.no_grad():
        truth = run(exact(module), latents.double(), doubled(given))
        eager = run(copy.deepcopy(module), latents, given)
        network = borrow_mmdit_control(module, Loan(module))
        got = by_us(network, latents, TIMES, given, copies=2)
    assert got.shape == (3, 2, 24, 48)
    verdict = judge("residuals", got, eager, truth)
    assert verdict.passed, verdict


def test_controlnet_without_guidance_of_several_pictures():
    module = controlled("sd3")
    text, pooled, *_ = conditions(3)
    given = MMDiTControlConditions(text, pooled, torch.randn(3, 5, 8, 12))
    latents, times = torch.randn(3, 4, 8, 12), torch.rand(2, 3) * 999
    with torch.no_grad():
        eager = torch.stack(by_diffusers(copy.deepcopy(module), latents, times[1], given))
        network = borrow_mmdit_control(module, Loan(module))
        got = by_us(network, latents, times, given)
    torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)


def test_what_a_controlnet_cannot_take_is_refused():
    text, pooled, *_ = conditions(2)
    latents, picture = torch.randn(1, 4, 8, 12), torch.randn(2, 5, 8, 12)
    given = MMDiTControlConditions(text, pooled, picture)
    with_text, without_text = controlled("sd3"), controlled("sd35-large, its own")
    network = borrow_mmdit_control(with_text, Loan(with_text))
    network.check(latents, given, copies=2)
    for bad, words in {
        given._replace(controlnet_cond=None): "controlnet_cond is missing",
        given._replace(controlnet_cond=picture[:, :4]): "5 channels",
        given._replace(controlnet_cond=picture[..., :8]): "beside",
        given._replace(controlnet_cond=picture[:1]): "for 1 pictures",
    }.items():
        with pytest.raises(Unsupported, match=words):
            network.check(latents, bad, copies=2)
    network = borrow_mmdit_control(without_text, Loan(without_text))
    tokens = torch.randn(1, 24, 48)
    network.check(tokens, given._replace(encoder_hidden_states=None), copies=2)
    with pytest.raises(Unsupported, match="given encoder_hidden_states"):
        network.check(tokens, given, copies=2)
    with pytest.raises(Unsupported, match="48 channels in 3"):
        network.check(latents, given._replace(encoder_hidden_states=None), copies=2)


LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.2", "norm1.linear", "norm1_context.linear"),
    *("norm_out.linear", "proj_out", "context_embedder", "pos_embed.proj"),
    *("timestep_embedder.linear_1", "text_embedder.linear_2"),
]


def test_lora_on_off_and_switched():
    module = transformer("sd35-medium")
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=LAYERS)
        module.add_adapter(config, name)
    module.set_adapters("first")
    network = borrow_mmdit(module, loan := Loan(module))
    latents, given = torch.randn(1, 4, 8, 8), conditions(2)
    seen = []

    def hold_now(scale=1.0):
        loan.refresh(scale)
        with torch.no_grad():
            got = by_us(network, latents, TIMES, given, 2)
            want = module(
                torch.cat([latents] * 2),
                timestep=TIMES[1].expand(2),
                encoder_hidden_states=given.encoder_hidden_states,
                pooled_projections=given.pooled_projections,
                joint_attention_kwargs={"scale": scale},
            ).sample
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        assert loan.intact()
        assert all((got - other).abs().max() > 0.01 for other in seen)
        seen.append(got)

    hold_now()
    hold_now(scale=0.5)
    module.set_adapters("second")
    hold_now()
    module.set_adapters(["first", "second"], [0.3, 0.7])
    hold_now()
    module.disable_adapters()
    hold_now()


EDITS = {
    "patch size": lambda net: setattr(net.pos_embed, "patch_size", 4),
    "positions": lambda net: setattr(net.pos_embed, "pos_embed", net.pos_embed.pos_embed * 2),
    "size of positions": lambda net: setattr(net.pos_embed, "pos_embed_max_size", 6),
    "channels": lambda net: setattr(net, "out_channels", 8),
    "config": lambda net: net.register_to_config(patch_size=4),
    "text": lambda net: setattr(net.transformer_blocks[0].attn, "context_pre_only", True),
    "heads": lambda net: setattr(net.transformer_blocks[0].attn, "heads", 6),
    "processors": lambda net: net.set_attn_processor(PAGJointAttnProcessor2_0()),
    "chunks": lambda net: net.enable_forward_chunking(1),
    "eps": lambda net: setattr(net.transformer_blocks[1].norm2, "eps", 1e-3),
    "eps of heads": lambda net: setattr(net.transformer_blocks[1].attn.norm_q, "eps", 1e-3),
    "gelu": lambda net: setattr(net.transformer_blocks[1].ff.net[0], "approximate", "none"),
    "last block": lambda net: setattr(net.transformer_blocks[1], "context_pre_only", True),
    "second attention": lambda net: setattr(net.transformer_blocks[0], "use_dual_attention", 0),
    "a block": lambda net: net.transformer_blocks.pop(2),
    "a weight": lambda net: setattr(net.proj_out, "weight", nn.Parameter(torch.zeros(16, 48))),
    "sinusoid": lambda net: setattr(net.time_text_embed.time_proj, "scale", 1000),
    "a function": lambda net: setattr(net.norm_out, "forward", lambda x, emb: x),
    "dtype": lambda net: net.double(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_what_was_read_are_noticed(edit):
    module = transformer("sd35-medium")
    borrow_mmdit(module, loan := Loan(module))
    assert loan.intact()
    EDITS[edit](module)
    assert not loan.intact()


def refused(edit):
    module = transformer("sd35-medium")
    edit(module)
    with pytest.raises(Unsupported) as raised:
        borrow_mmdit(module, Loan(module, rehearsal=True))
    return str(raised.value)


def test_unsupported_modules_are_refused():
    def processor(kind):
        return lambda net: net.set_attn_processor(kind())

    assert "FusedJointAttnProcessor2_0" in refused(processor(FusedJointAttnProcessor2_0))
    assert "PAGJointAttnProcessor2_0" in refused(processor(PAGJointAttnProcessor2_0))
    assert "in chunks" in refused(EDITS["chunks"])
    assert "a GELU" in refused(EDITS["gelu"])
    assert "unpatched at another size" in refused(EDITS["config"])
    assert "channels" in refused(EDITS["channels"])
    assert "positions" in refused(EDITS["size of positions"])
    assert "before the last" in refused(EDITS["last block"])

    def backend(net):
        net.transformer_blocks[0].attn.processor._attention_backend = "flash"

    assert "backend" in refused(backend)
    assert "does not update its text" in refused(EDITS["text"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_moves_no_weight(kind):
    module = transformer(kind)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    borrow_mmdit(module, Loan(module, rehearsal=True))
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    borrow_mmdit(module, loan := Loan(module))
    assert [parameter.data_ptr() for parameter in module.parameters()] != before
    loan.end()
    latents, given = torch.randn(1, 4, 8, 8), conditions(1)
    with torch.no_grad():
        again = by_diffusers(module, latents, TIMES[1], given)
        torch.testing.assert_close(again, by_diffusers(transformer(kind), latents, TIMES[1], given))


BAD = {
    "channels in 4": (lambda x, c: (x[:, :3], c)),
    "in 4 dimensions": (lambda x, c: (x[0], c)),
    "torch.float64": (lambda x, c: (x.double(), c)),
    "on meta": (lambda x, c: (x, c._replace(pooled_projections=torch.empty(2, 24).to("meta")))),
    "larger than 12": (lambda x, c: (torch.randn(1, 4, 8, 26), c)),
    "no patch": (lambda x, c: (x[..., :1], c)),
    "encoder_hidden_states is missing": (lambda x, c: (x, c._replace(encoder_hidden_states=None))),
    "pooled_projections is missing": (lambda x, c: (x, c._replace(pooled_projections=None))),
    "1 latents in 2 copies": (lambda x, c: (x, conditions(3))),
    "pooled_projections is for 1": (
        lambda x, c: (x, c._replace(pooled_projections=torch.randn(1, 24)))
    ),
    "encoder_hidden_states is empty": (
        lambda x, c: (x, c._replace(encoder_hidden_states=torch.randn(2, 0, 40)))
    ),
    "hidden_states is empty": (lambda x, c: (x, c._replace(block_controlnet_hidden_states=[]))),
    "has 5 tokens": (
        lambda x, c: (x, c._replace(block_controlnet_hidden_states=[torch.randn(2, 5, 48)]))
    ),
    "an IP-Adapter": (lambda x, c: (x, c._replace(ip_adapter_image_embeds=torch.randn(2, 6, 20)))),
}


@pytest.mark.parametrize("words", BAD)
def test_wrong_inputs_are_refused(words):
    module = transformer("sd3")
    network = borrow_mmdit(module, Loan(module))
    latents, given = torch.randn(1, 4, 8, 8), conditions(2)
    network.check(latents, given, copies=2)
    with pytest.raises(Unsupported, match=words):
        network.check(*BAD[words](latents, given), copies=2)


@pytest.mark.parametrize("kind", KINDS)
def test_by_triton_kernels(kind, monkeypatch):
    monkeypatch.setattr(borrow, "NATIVE", None)  # weights are stored as GPU libraries want them
    for name, kernel in all_kernels().items():
        if "triton" in kernel.implementations:
            place = import_module(f"fastdiff.kernels.{name}")
            monkeypatch.setattr(place, "_op", kernel.implementations["triton"]())
    given = conditions(2, tokens=20)
    given.encoder_hidden_states[:, 5:] = 0
    hold(transformer(kind, num_layers=2), torch.randn(1, 4, 6, 8), given, copies=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("more", ["skip_layers", "block_controlnet_hidden_states", PICTURES])
def test_a_step_on_a_cpu_runs_only_our_kernels(more, dtype):
    """So a tape can replace it: SD3.5-medium with guidance, without T5."""
    module = with_ip_adapter(transformer("sd35-medium", dtype))
    value = {
        "skip_layers": (1,),
        "block_controlnet_hidden_states": [torch.randn(2, 24, 48).to(dtype)] * 2,
        PICTURES: torch.randn(2, 6, 20).to(dtype),
    }
    given = conditions(2, dtype, tokens=20, **{more: value[more]})
    given.encoder_hidden_states[:, 5:] = 0
    network = borrow_mmdit(module, Loan(module))
    with torch.no_grad():
        rows, constants = network.hoist(given, TIMES, (8, 12))
        patches = network.pack(torch.randn(1, 4, 8, 12).to(dtype))
        predicted = network.predict(patches, at(rows, 1), constants)
    tape = record(lambda x: network.predict(x, at(rows, 1), constants), [patches])
    assert tape is not None
    assert torch.equal(tape.run(), predicted)


FULL = {
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
}
SIZES = {
    "sd3": (340, 24, {"pos_embed_max_size": 192}),
    "sd35-medium": (
        470,
        24,
        {
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "sd35-large": (620, 38, {"pos_embed_max_size": 192, "qk_norm": "rms_norm"}),
}


@pytest.mark.parametrize("name", SIZES)
def test_launches_of_a_guided_step(name):
    """At 1024², with all 333 tokens of the text."""
    limit, layers, config = SIZES[name]
    with torch.device("meta"):
        module = SD3Transformer2DModel(
            **FULL,
            **config,
            num_layers=layers,
            num_attention_heads=layers,
            caption_projection_dim=64 * layers,
        )
        module = module.half().eval()
        network = borrow_mmdit(module, Loan(module, rehearsal=True))
        given = MMDiTConditions(
            torch.empty(2, 333, 4096).half(), torch.empty(2, 2048, dtype=torch.float16)
        )
        hoisted = network.hoist(given, torch.empty(28, 1), (128, 128))
        row = at(hoisted.rows, 0)
        x = network.pack(torch.empty(1, 16, 128, 128).half())
        state, history = x.float(), torch.empty(2, 0, *x.shape)
        table, step = torch.empty(1, HISTORY + 1), torch.empty(1, dtype=torch.int64)

    def run():
        output = network.predict(x, row, hoisted.constants)
        assert output.shape == (2, 4096, 64)
        guided_step(output, state, history, x, table, step)

    count = sum(work.launches for _, work in launched(run, 90))
    assert count <= limit
