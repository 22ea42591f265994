"""offload_hoisted: weights that wait in host memory between pictures. A CPU stands for the GPU: the
waiting weights are in memory that the tests know, and using them copies them."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from flux_calls import draw
from peft import LoraConfig
from small import DIT, FLUX, PIXART, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.models import borrow, weights

STEPS = 3
VAE = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


class Memory:
    """The stand-in for host memory, and weak references to the copies made from it."""

    def __init__(self):
        self.places, self.copies = [], []

    def host(self, shape, dtype):
        memory = torch.full(shape, float("nan"), dtype=dtype)
        self.places.append(memory)  # kept, so that its addresses are not reused
        return memory

    def bring(self, weight, bias, device):
        copies = weight.clone(), None if bias is None else bias.clone()
        self.copies += [weakref.ref(copy) for copy in copies if copy is not None]
        return copies

    def holds(self, tensor):
        ours = ((place.data_ptr(), place.nbytes) for place in self.places)
        return any(0 <= tensor.data_ptr() - start < size for start, size in ours)

    def bytes_of(self, module):
        return sum(p.nbytes for p in module.parameters() if self.holds(p))


@pytest.fixture
def memory(monkeypatch):
    made = Memory()
    monkeypatch.setattr(borrow, "may_wait", lambda device: True)
    monkeypatch.setattr(borrow, "host_memory", made.host)
    monkeypatch.setattr(weights, "_brought", made.bring)
    monkeypatch.setattr(borrow, "NATIVE", None)  # so that weights get the GPU's layout
    return made


def dit():
    pipe = DiTPipeline(
        noisy(DiTTransformer2DModel(**DIT)),
        noisy(AutoencoderKL(**VAE)),
        DDIMScheduler(clip_sample=False),
    )
    return pipe, {"class_labels": [7, 3]}


def pixart():
    transformer = noisy(PixArtTransformer2DModel(**PIXART))
    vae, scheduler = noisy(AutoencoderKL(**VAE)), DPMSolverMultistepScheduler()
    pipe = PixArtSigmaPipeline(None, None, vae, transformer, scheduler)
    text, mask = torch.randn(1, 9, 20), torch.ones(1, 9)
    texts = {"prompt_embeds": text, "prompt_attention_mask": mask}
    texts |= {f"negative_{name}": value for name, value in texts.items()}
    options = {"use_resolution_binning": False, "height": 16, "width": 16, "prompt": None}
    return pipe, texts | options | {"negative_prompt": None}


@pytest.fixture
def sd3(components_sd3):
    pipe = StableDiffusion3Pipeline(**components_sd3("sd35-medium", dtype=torch.float32))
    return pipe, {"prompt": "red heart", "height": 16, "width": 16}


@pytest.fixture
def sample(request, sd3):
    torch.manual_seed(1)
    return {"sd3": sd3}.get(request.param) or globals()[request.param]()


def drawn(pipe, given, **more):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe(**given, generator=generator, **options | more).images)


def test_weights_are_brought_piece_by_piece(memory, monkeypatch):
    """At most one piece is on the device at a time, and each row is multiplied once."""
    x, layer = torch.randn(2, 5, 24), torch.nn.Linear(24, 300)
    waiting = weights.Weights(layer.weight.detach(), layer.bias.detach(), waits=True)
    monkeypatch.setattr(weights, "PIECE", 7 * 24 * 4)
    at_once, bring = [], memory.bring

    def brought(*given):
        copies = bring(*given)
        at_once.append(sum(ref() is not None for ref in memory.copies))
        return copies

    monkeypatch.setattr(weights, "_brought", brought)
    with torch.no_grad():
        torch.testing.assert_close(weights.project(x, waiting), layer(x))
    assert (len(at_once), max(at_once)) == (43, 2)


@pytest.mark.parametrize("sample", ["dit", "pixart", "sd3"], indirect=True)
def test_waiting_weights_are_in_host_memory_and_pictures_are_the_same(sample, memory):
    pipe, given = sample
    eager = drawn(pipe, given)
    state = copy.deepcopy(pipe.transformer.state_dict())
    plain = [drawn(fastdiff.compile(pipe), given) for _ in range(2)]
    fastdiff.restore(pipe)
    net = fastdiff.compile(pipe, offload_hoisted=True).transformer
    waits = memory.bytes_of(net)
    names = [name for name, p in net.named_parameters() if memory.holds(p)]
    assert waits == slot_of(net).loan.waiting > 2 * (net.inner_dim**2) * 4 * 6
    assert f"{waits / 1e9:.3g} GB of its weights wait in host memory" in str(fastdiff.report(pipe))
    counts = []
    for picture in plain:
        torch.testing.assert_close(drawn(pipe, given), picture, rtol=0, atol=0)
        assert memory.bytes_of(net) == waits
        assert not any(ref() is not None for ref in memory.copies)
        counts.append(len(memory.copies))
    # a picture copies each waiting weight once, for any number of steps
    drawn(pipe, given, num_inference_steps=STEPS + 2)
    first = counts[0]
    assert (counts[1], len(memory.copies)) == (2 * first, 3 * first)
    assert loop_of(pipe).planned == 3
    found = net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert memory.bytes_of(net) == waits  # reading a state dict moves no weight
    fastdiff.restore(pipe)
    assert not any(memory.holds(net.get_parameter(name)) for name in names)
    assert torch.equal(drawn(pipe, given), eager)


def test_the_weights_of_controlnets_wait_too(components_flux, picture, memory):
    """Of each of two, in the plan of their transformer."""
    own = FLUX | {"num_layers": 1, "num_single_layers": 1}
    nets = [noisy(FluxControlNetModel(**own), seed) for seed in (1, 2)]
    pipe = FluxControlNetPipeline(
        **components_flux(torch.float32, guidance_embeds=False),
        controlnet=FluxMultiControlNetModel(nets),
    )
    images = [picture(seed)[..., :12].float() for seed in (1, 2)]
    call = {"control_image": images, "controlnet_conditioning_scale": [0.6, 1.2]}
    plain = draw(fastdiff.compile(pipe), **call)
    fastdiff.restore(pipe)
    fastdiff.compile(pipe, offload_hoisted=True)
    waiting = [memory.bytes_of(net) for net in (pipe.transformer, *nets)]
    assert waiting[1] == waiting[2] > nets[0].inner_dim ** 2 * 4 * (2 * 6 + 3)
    torch.testing.assert_close(draw(pipe, **call), plain, rtol=0, atol=0)
    first = len(memory.copies)
    draw(pipe, **call, num_inference_steps=5)
    assert len(memory.copies) == 2 * first  # once a picture
    assert loop_of(pipe).planned == 2
    assert str(fastdiff.report(pipe)).count("GB of its weights wait in host memory") == 3
    assert [memory.bytes_of(net) for net in (pipe.transformer, *nets)] == waiting
    fastdiff.restore(pipe)
    assert [memory.bytes_of(net) for net in (pipe.transformer, *nets)] == [0, 0, 0]


def test_edits_copies_and_adapters_work_as_without_the_option(sd3, memory, tmp_path):
    """An eager twin gets the same changes."""
    pipe, given = sd3
    twin = copy.deepcopy(pipe)
    net = fastdiff.compile(pipe, offload_hoisted=True).transformer

    def hold():
        torch.testing.assert_close(drawn(pipe, given), drawn(twin, given), rtol=0, atol=1e-5)

    hold()
    waits = memory.bytes_of(net)
    with torch.no_grad():
        for own in (net, twin.transformer):
            own.transformer_blocks[0].norm1.linear.weight[3:9] *= 1.3
            own.state_dict()["norm_out.linear.bias"] += 0.2
    hold()
    net.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), twin.transformer.parameters()))
    copied = copy.deepcopy(net)
    assert memory.bytes_of(copied) == 0
    assert all(map(torch.equal, copied.parameters(), twin.transformer.parameters()))
    hold()
    assert memory.bytes_of(net) == waits
    config = LoraConfig(r=2, target_modules=["norm1.linear", "to_q"], init_lora_weights=False)
    for own in (net, twin.transformer):
        torch.manual_seed(2)
        own.add_adapter(config)
    hold()
    assert memory.bytes_of(net) == 0
    assert "those with adapters stay" in str(fastdiff.report(pipe))
    for own in (net, twin.transformer):
        own.delete_adapters("default")
    hold()
    assert "those with adapters stay" in str(fastdiff.report(pipe))  # PEFT keeps its layers


def test_an_eager_call_brings_all_weights_back(sd3, memory):
    pipe, given = sd3
    net = fastdiff.compile(pipe, offload_hoisted=True).transformer
    picture, waits = drawn(pipe, given), memory.bytes_of(net)
    with torch.autocast("cpu", torch.bfloat16):
        drawn(pipe, given)
    assert "autocast is on" in slot_of(net).eager
    assert memory.bytes_of(net) == 0
    assert torch.equal(drawn(pipe, given), picture)
    assert memory.bytes_of(net) == waits
    _, hook = cpu_offload_with_hook(net, "cpu")  # as enable_model_cpu_offload
    torch.testing.assert_close(drawn(pipe, given), picture, rtol=0, atol=1e-5)
    assert memory.bytes_of(net) == 0
    assert "a hook that wraps one of its modules" in str(fastdiff.report(pipe))
    hook.remove()
    assert torch.equal(drawn(pipe, given), picture)
    assert memory.bytes_of(net) == waits


def test_a_loop_that_diffusers_runs_and_two_threads(sd3, memory):
    """diffusers' own loop, which a callback causes, brings the weights in each step."""
    pipe, given = sd3
    other = copy.deepcopy(pipe)  # schedulers and tokenizers keep state, so threads need their own
    other.transformer = pipe.transformer
    for one in (pipe, other):
        fastdiff.compile(one, offload_hoisted=True)
    picture = drawn(pipe, given)
    asked = {
        "callback_on_step_end": lambda *_: {},
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    torch.testing.assert_close(drawn(pipe, given, **asked), picture, rtol=0, atol=1e-5)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda one: drawn(one, given), (pipe, other)))
    assert all(torch.equal(one, picture) for one in both)
    assert not any(ref() is not None for ref in memory.copies)


def test_on_a_cpu_no_weight_moves():
    pipe, given = dit()
    eager = drawn(pipe, given)
    fastdiff.compile(pipe, offload_hoisted=True)
    torch.testing.assert_close(drawn(pipe, given), eager, rtol=0, atol=1e-5)
    assert "offload_hoisted moves nothing" in str(fastdiff.report(pipe))
    with pytest.raises(UserError, match="compiled with another offload_hoisted already"):
        fastdiff.compile(pipe)


def test_pipelines_without_waiting_weights_are_refused(components):
    unet = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    pipe, _ = dit()
    for target, options, why in (
        (unet, {}, "every step needs all weights"),
        (pipe.transformer, {}, "needs a pipeline whose loop runs as a plan"),
        (pipe, {"ignore": ("loop",)}, "needs a pipeline whose loop runs as a plan"),
    ):
        with pytest.raises(UserError, match=why):
            fastdiff.compile(target, offload_hoisted=True, **options)
    assert slot_of(unet.unet) is None
