"""Every common way of saving writes the same weights for a compiled model as for an eager one."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate import utils as accelerate_utils
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from huggingface_hub import save_torch_model
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import fastdiff
from fastdiff.compiler.slot import slot_of


def call(unet):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    return unet(given[0], torch.tensor(7), given[1])[0]


@pytest.fixture
def both(unet):
    """An eager model, and a compiled copy that has been called."""
    fast = fastdiff.compile(copy.deepcopy(unet))
    with torch.no_grad():
        call(fast)
        call(fast)
    return unet, fast


def in_folder(folder):
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= load_file(file)
    return found


def torch_saved(what, folder):
    torch.save(what, folder / "it.pt")
    return torch.load(folder / "it.pt", weights_only=False)


def ema(unet, folder):
    average = EMAModel(
        unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, decay=0.5
    )
    average.step(unet.parameters())
    average.save_pretrained(folder)
    return in_folder(folder)


def state_saved(unet, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(unet)
    accelerator.save_state(folder)
    return in_folder(folder)


SAVERS = {
    "save_pretrained": lambda u, f: (u.save_pretrained(f), in_folder(f))[1],
    "save_file": lambda u, f: (save_file(u.state_dict(), f / "a.safetensors"), in_folder(f))[1],
    "save_file of a part": lambda u, f: (
        save_file(u.down_blocks.state_dict(), f / "a.safetensors"),
        in_folder(f),
    )[1],
    "save_file of a layer": lambda u, f: (
        save_file(u.conv_in.state_dict(prefix="x."), f / "a.safetensors"),
        in_folder(f),
    )[1],
    "save_model": lambda u, f: (save_model(u, f / "a.safetensors"), in_folder(f))[1],
    "save_torch_model": lambda u, f: (save_torch_model(u, f), in_folder(f))[1],
    "accelerate save_model": lambda u, f: (Accelerator(cpu=True).save_model(u, f), in_folder(f))[1],
    "accelerate save_state": state_saved,
    "accelerate save": lambda u, f: (
        accelerate_utils.save(u.state_dict(), f / "a.safetensors", safe_serialization=True),
        in_folder(f),
    )[1],
    "torch.save of a state dict": lambda u, f: torch_saved(u.state_dict(), f),
    "torch.save of a module": lambda u, f: torch_saved(u, f).state_dict(),
    "torch.save of a part": lambda u, f: torch_saved(u.mid_block, f).state_dict(),
    "torch.save of parameters": lambda u, f: torch_saved(dict(u.named_parameters()), f),
    "pickle": lambda u, f: pickle.loads(pickle.dumps(u)).state_dict(),
    "deepcopy": lambda u, f: copy.deepcopy(u).state_dict(),
    "EMA": ema,
}


@torch.no_grad()
@pytest.mark.parametrize("saver", SAVERS.values(), ids=SAVERS)
def test_savers(both, saver, tmp_path):
    eager, fast = both
    (tmp_path / "eager").mkdir()
    (tmp_path / "fast").mkdir()
    want, got = saver(eager, tmp_path / "eager"), saver(fast, tmp_path / "fast")
    assert want
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name
        assert tensor.dtype == got[name].dtype
    # the compiled model continues with its own weights
    calls = slot_of(fast).fast
    torch.testing.assert_close(call(fast), call(eager), rtol=1e-4, atol=1e-5)
    assert slot_of(fast).fast == calls + 1
    assert fast.conv_in.weight.data_ptr() != eager.conv_in.weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
def test_copies_are_eager(both, copied):
    """A copy of a compiled model has ordinary parameters and no hooks of fastdiff."""
    eager, fast = both
    other = copied(fast)
    for (name, weight), mine in zip(other.named_parameters(), eager.parameters(), strict=True):
        assert type(weight) is nn.Parameter
        assert weight.stride() == mine.stride(), name
        assert weight.untyped_storage().nbytes() == mine.untyped_storage().nbytes(), name
    left = {key for key in vars(other) if "fastdiff" in key and vars(other)[key] is not None}
    assert not left
    assert not [m for m in other.modules() if m._state_dict_hooks or "__getstate__" in vars(m)]


class WithoutFastdiff(pickle.Unpickler):
    """Reads as a process does that has no fastdiff."""

    def find_class(self, module, name):
        if module.partition(".")[0] == "fastdiff":
            raise ModuleNotFoundError(f"no {module}, which has {name}")
        return super().find_class(module, name)


def test_a_pickle_needs_no_fastdiff(both):
    _, fast = both
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    reader = SimpleNamespace(__name__="reader", Unpickler=WithoutFastdiff)
    other = torch.load(buffer, pickle_module=reader, weights_only=False)
    assert type(other) is type(fast)
    for mine, theirs in zip(other.parameters(), fast.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ModuleNotFoundError, match=r"no fastdiff\.compiler\.slot"):
        WithoutFastdiff(io.BytesIO(pickle.dumps(slot_of))).load()


@torch.no_grad()
def test_saved_weights_load_into_a_compiled_model(both, tmp_path):
    """The compiled model uses the loaded weights."""
    eager, fast = both
    other = copy.deepcopy(eager)
    for weight in other.parameters():
        weight.mul_(1.1)
    save_model(other, tmp_path / "other.safetensors")
    load_model(fast, tmp_path / "other.safetensors")
    torch.testing.assert_close(call(fast), call(other), rtol=1e-4, atol=1e-5)
    fast.load_state_dict(eager.state_dict())
    torch.testing.assert_close(call(fast), call(eager), rtol=1e-4, atol=1e-5)
    fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    torch.testing.assert_close(call(fast), call(other), rtol=1e-4, atol=1e-5)


def moved(unet):
    unet.to(torch.float64).to(torch.float32)


def adapted(unet):
    torch.manual_seed(1)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]), "a")


BETWEEN = {
    "nothing": lambda unet: None,
    "a picture": lambda unet: call(unet),
    "another state dict": lambda unet: unet.state_dict(),
    "an adapter": adapted,
    "an edit": lambda unet: unet.conv_out.weight.mul_(2),
    "weights that move": moved,
}


@torch.no_grad()
@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_writes_into_a_state_dict_change_the_model(both, between, restored):
    """As in eager torch, where a state dict shares the parameters' memory."""
    states = []
    for unet in both:
        state = unet.state_dict()
        between(unet)
        for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.bias"):
            state[name].mul_(-1.5)
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        state[layer].add_(0.3)
        if restored and unet is both[1]:
            fastdiff.restore(unet)
        states.append(state)
    torch.testing.assert_close(call(both[1]), call(both[0]), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(both[1].parameters(), both[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def every_entry(unet, other):
    for value in unet.state_dict().values():
        value.mul_(0.97)


def one_entry(unet, other):
    unet.state_dict()[CONV].copy_(torch.zeros_like(unet.state_dict()[CONV]))


def tried_and_undone(unet, other):
    state = unet.state_dict()
    for value in state.values():
        value.mul_(0.9)
    unet.load_state_dict(other)
    return state


def then_the_parameter(unet, other):
    state = unet.state_dict()
    state[CONV].mul_(0.5)
    unet.get_parameter(CONV).zero_()
    return state


def before_the_parameter(unet, other):
    state = unet.state_dict()
    unet.get_parameter(CONV).zero_()
    state[CONV][:1].add_(0.1)
    return state


def two_at_once(unet, other):
    first, second = unet.state_dict(), unet.state_dict()
    first[CONV].zero_()
    second[CONV].add_(0.01)
    return first, second


def through_numpy(unet, other):
    state = unet.state_dict()
    state[CONV].numpy()[...] = 0
    return state


def loaded_into_itself(unet, other):
    state = unet.state_dict()
    for weight in unet.parameters():
        weight.mul_(0.97)
    unet.load_state_dict(state)


CONV = "mid_block.resnets.0.conv1.weight"
WRITES = (
    *(every_entry, one_entry, tried_and_undone, then_the_parameter, before_the_parameter),
    *(two_at_once, through_numpy, loaded_into_itself),
)


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_state_dict_and_the_parameters_agree_after_any_writes(both, write):
    """Writes into a state dict or the parameters, in any order, with the dict kept or dropped."""
    other = {name: value * 1.01 for name, value in both[0].state_dict().items()}
    _ = [write(unet, other) for unet in both]
    torch.testing.assert_close(call(both[1]), call(both[0]), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(both[1].parameters(), both[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_state_dict_hooks_of_users_run_last(unet):
    def less(module, state, prefix, meta):
        del state[prefix + "weight"]

    def half(module, state, prefix, meta):
        state[prefix + "weight"] = state[prefix + "weight"].half()

    unet.mid_block.resnets[0].conv1._register_state_dict_hook(less)
    fastdiff.compile(unet)
    unet.mid_block.resnets[0].conv2._register_state_dict_hook(half)
    for _ in range(2):
        state = unet.state_dict()
        assert CONV not in state
        assert state[CONV.replace("conv1", "conv2")].dtype == torch.float16
        call(unet)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
def test_a_model_and_its_optimizer_copied_together_share_parameters(both, copied):
    for unet in both:
        made = copied({"unet": unet, "optimizer": torch.optim.SGD(unet.parameters(), lr=1.0)})
        (group,) = made["optimizer"].param_groups
        own = [*made["unet"].parameters()]
        assert [*map(id, group["params"])] == [*map(id, own)]


@torch.no_grad()
def test_state_dicts_of_peft_adapters_are_the_same(both):
    states = []
    for unet in both:
        torch.manual_seed(1)
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "a")
        call(unet)
        states.append(get_peft_model_state_dict(unet, adapter_name="a"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@torch.no_grad()
def test_a_dropped_state_dict_moves_no_weight(both):
    _, fast = both
    before = [weight.data_ptr() for weight in fast.parameters()]
    for _ in range(3):
        fast.state_dict()
        call(fast)
    assert [weight.data_ptr() for weight in fast.parameters()] == before, "no weight moved"
    assert not any(slot_of(fast)._homes.values())
