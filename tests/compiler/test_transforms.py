"""Under torch's transforms, tracers and modes, a compiled network behaves as the eager one."""

import copy
import warnings

import pytest
import torch
from covered import covered
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.compiler.slot import slot_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Of(nn.Module):
    """A network as a function of one tensor."""

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x):
        return self.call(self.net, x)


NETWORKS = ["unet", "decoder", "encoder", "controlnet"]


@pytest.fixture(params=NETWORKS)
def networks(request, components):
    """The eager network, the compiled one, its slot, and an input."""
    parts = components(dtype=torch.float32)
    unet = parts["unet"]
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    name, channels, size = request.param, 4, 4
    match name:
        case "unet":
            target = unet

            def call(net, x):
                return net(x, 5, text.expand(len(x), -1, -1))[0]

        case "controlnet":
            small = {"conditioning_embedding_out_channels": (16, 32)}
            target = ControlNetModel.from_unet(unet, **small).eval()
            picture = torch.rand(1, 3, 8, 8, generator=generator)
            for weight in target.parameters():
                nn.init.normal_(weight, 0.0, 0.1, generator)

            def call(net, x):
                return net(x, 5, text, picture, return_dict=False)[1]

        case half:
            target, size, channels = parts["vae"], 8, 3 if half == "encoder" else 4

            def call(net, x):
                return net(x)

    for module in target.modules():
        if hasattr(module, "set_processor"):
            # torch's fused attention has no forward-mode derivative
            module.set_processor(AttnProcessor())
    target.requires_grad_(False)
    theirs, ours = (
        getattr(net, name, net) for net in (target, fastdiff.compile(copy.deepcopy(target)))
    )
    x = torch.randn(1, channels, size, size, generator=generator)
    slot = slot_of(ours)
    with torch.no_grad():
        call(ours, x)
    assert slot.fast == 1, slot.eager
    return Of(theirs, call).eval(), Of(ours, call).eval(), slot, x


def jvp(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def jvp_without_gradients(f, x):
    with torch.no_grad():
        return jvp(f, x)


def vjp(f, x):
    out, back = torch.func.vjp(f, x)
    return back(torch.ones_like(out))[0]


def grad(f, x):
    return torch.func.grad(lambda z: f(z).pow(2).mean())(x)


def hessian(f, x):
    return torch.func.jvp(torch.func.grad(lambda z: f(z).pow(2).mean()), (x,), (x,))[1]


def vmap(f, x):
    with torch.no_grad():
        return torch.func.vmap(lambda z: f(z[None])[0])(x)


def functionalize(f, x):
    with torch.no_grad():
        return torch.func.functionalize(f)(x)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def traced(f, x):
    with torch.no_grad():
        return torch.jit.trace(f, (x,), check_trace=False)(x * 2)


def made_fx(f, x):
    with torch.no_grad():
        return make_fx(f)(x)(x * 2)


def made_fx_early(f, x):
    with torch.no_grad():
        return make_fx(f, pre_dispatch=True)(x)(x * 2)


def autocast(f, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return f(x).float()


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is nn.functional.group_norm else result


class Halving(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        return result / 2 if op is torch.ops.aten.convolution.default else result


def function_mode(f, x):
    with torch.no_grad(), Doubling():
        return f(x)


def dispatch_mode(f, x):
    with torch.no_grad(), Halving():
        return f(x)


def dynamo(f, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(f, backend="eager", fullgraph=True)(x)


def exported(f, x):
    with torch.no_grad():
        return torch.export.export(f, (x,), strict=False).module()(x)


def exported_strictly(f, x):
    with torch.no_grad():
        return torch.export.export(f, (x,), strict=True).module()(x)


EAGER = {
    "jvp": jvp,
    "jvp without gradients": jvp_without_gradients,
    "vjp": vjp,
    "grad": grad,
    "hessian": hessian,
    "vmap": vmap,
    "functionalize": functionalize,
    "dual": dual,
    "jit.trace": traced,
    "make_fx": made_fx,
    "make_fx before dispatch": made_fx_early,
    "autocast": autocast,
    "function mode": function_mode,
    "dispatch mode": dispatch_mode,
    "dynamo": dynamo,
    "export": exported,
    "strict export": exported_strictly,
}


SLOW = (hessian, dynamo, exported, exported_strictly)
"""These take seconds with most networks, so `make test` runs them with the decoder, which is traced
soonest, and the others with two networks; all networks share the code."""


@pytest.mark.parametrize(
    ("networks", "transform"),
    covered(
        NETWORKS,
        [pytest.param(transform, id=name) for name, transform in EAGER.items()],
        together=1,
        always=lambda network, transform: (
            network == "decoder"
            if transform in SLOW
            else network in NETWORKS[:2] or transform is jvp
        ),
    ),
    indirect=["networks"],
)
def test_under_a_transform_diffusers_code_runs(networks, transform):
    theirs, ours, slot, x = networks
    want = transform(theirs, x)
    got = transform(ours, x)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert slot.fast == 1
    with torch.no_grad():
        ours(x)
    assert slot.fast == 2  # afterwards it is fast again


def under(change, back):
    def run(f, x):
        before = change()
        try:
            with torch.no_grad():
                return f(x)
        finally:
            back(before)

    return run


def inference(f, x):
    with torch.inference_mode():
        return f(x)


def on_another_device(f, x):
    with torch.no_grad(), torch.device("cpu"):
        return f(x)


def anomaly(f, x):
    with torch.no_grad(), torch.autograd.detect_anomaly(check_nan=True):
        return f(x)


def deterministic():
    torch.use_deterministic_algorithms(True)


def double():
    torch.set_default_dtype(torch.float64)


FAST = {
    "inference": inference,
    "default device": on_another_device,
    "anomaly": anomaly,
    "deterministic": under(deterministic, lambda _: torch.use_deterministic_algorithms(False)),
    "default dtype": under(double, lambda _: torch.set_default_dtype(torch.float32)),
}


@pytest.mark.parametrize("mode", FAST.values(), ids=FAST)
def test_modes_that_change_no_operation_stay_fast(networks, mode):
    theirs, ours, slot, x = networks
    torch.testing.assert_close(mode(ours, x), mode(theirs, x), rtol=1e-3, atol=1e-4)
    assert slot.fast == 2


def test_fake_tensors_and_proxies(networks):
    theirs, ours, slot, x = networks
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = mode.from_tensor(x)
        assert ours(fake).shape == theirs(fake).shape
    for f in (theirs, ours):  # diffusers' code branches on its inputs
        with (
            pytest.raises((torch.fx.proxy.TraceError, RuntimeError), match="symbolic"),
            torch.no_grad(),
        ):
            torch.fx.symbolic_trace(f)
    assert slot.fast == 1


def vmapped(f, x):
    return torch.func.vmap(f)(torch.stack([x, x * 0.5]))


def compiled_eagerly(f, x):
    torch._dynamo.reset()
    return torch.compile(f, backend="eager")(x)


@pytest.mark.parametrize(
    "transform",
    # dynamo takes 10 s, and the loop makes the same checks as the networks above
    [jvp, vmapped, pytest.param(compiled_eagerly, marks=pytest.mark.product)],
)
def test_under_a_transform_diffusers_loop_runs(components, transform):
    from diffusers import StableDiffusionPipeline

    parts = components(dtype=torch.float32)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.set_attn_processor(AttnProcessor())
    plain = copy.deepcopy(pipe)
    fastdiff.compile(pipe)
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))

    def drawn(of, latents):
        given = {"prompt_embeds": text, "guidance_scale": 1.0, "num_inference_steps": 2}
        return of(**given, latents=latents, height=8, width=8, output_type="latent").images

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = (lambda f, x: f(x)) if transform is compiled_eagerly else transform
        want = eager(lambda x: drawn(plain, x), latents)
        got = transform(lambda x: drawn(pipe, x), latents)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert fastdiff.report(pipe).parts[0].runs == "fastdiff"
        torch.testing.assert_close(
            drawn(pipe, latents), drawn(plain, latents), rtol=1e-3, atol=1e-4
        )
