"""`Options(text_cache=n)`: text encoders' outputs are cached, and never stale."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import CpuOffload, remove_hook_from_module
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from peft import LoraConfig
from small import noisy
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)
from transformers.models.clip import modeling_clip

import fastdiff
from fastdiff.compiler.text_cache import cache_of, keep_texts
from fastdiff.errors import UserError

WORDS = 50
CLIP = CLIPTextConfig(
    vocab_size=WORDS,
    hidden_size=16,
    intermediate_size=32,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    bos_token_id=1,
    eos_token_id=WORDS - 1,
)
T5 = T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
ENCODERS = {
    "CLIP": lambda: CLIPTextModel(CLIP),
    "CLIP with projection": lambda: CLIPTextModelWithProjection(CLIP),
    "T5": lambda: T5EncoderModel(T5),
}
IDS = torch.tensor([[1, 7, 8, 8, WORDS - 1, 0, 0], [1, 9, 4, 2, 3, WORDS - 1, 0]])
MASK = (IDS > 0).long()


def made(name):
    torch.manual_seed(0)
    encoder = noisy(copy.deepcopy(ENCODERS[name]()))
    keep_texts({"text_encoder": encoder}, 8)
    return encoder


@pytest.fixture
def clip():
    return made("CLIP")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def counts(encoder):
    cache = cache_of(encoder)
    return cache.hits, cache.misses, sum(cache.past.values())


def flat(output):
    """The tensors of an output, by name if they have one."""
    items = output.items() if hasattr(output, "items") else enumerate(output)
    return {
        (name, index): tensor
        for name, part in items
        for index, tensor in enumerate(part if isinstance(part, tuple) else (part,))
    }


def same(one, other):
    left, right = flat(one), flat(other)
    return (
        type(one) is type(other)
        and left.keys() == right.keys()
        and all(
            torch.equal(left[name], right[name]) and left[name].stride() == right[name].stride()
            for name in left
        )
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_a_repeated_call_returns_the_cached_output(name):
    encoder = made(name)
    calls = [
        ((IDS,), {}),
        ((IDS,), {"attention_mask": MASK}),
        ((IDS,), {"output_hidden_states": True}),
        ((IDS,), {"output_hidden_states": True, "return_dict": False}),
        ((), {"input_ids": IDS[:1], "attention_mask": None}),
        ((IDS[1:],), {}),
    ]
    own = [encoder._call_impl(*args, **more) for args, more in calls]
    for again in range(2):
        for (args, more), want in zip(calls, own, strict=True):
            assert same(encoder(*args, **more), want)
        assert counts(encoder) == (again * len(calls), len(calls), 0)
    with torch.inference_mode():
        result = encoder(IDS)
    assert same(result, own[0])
    assert counts(encoder)[0] == len(calls) + 1


def test_edits_of_a_returned_output_do_not_change_the_cache(clip):
    want = clip._call_impl(IDS).last_hidden_state
    for _ in range(3):
        clip(IDS).last_hidden_state.zero_()
    assert torch.equal(clip(IDS).last_hidden_state, want)
    with torch.inference_mode():
        kept_in_inference = clip(IDS[:1]).last_hidden_state
    clip(IDS[:1]).last_hidden_state.add_(1)  # an ordinary tensor, as from the encoder
    assert torch.equal(clip(IDS[:1]).last_hidden_state, kept_in_inference)


def lora(encoder):
    encoder.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return next(m for m in encoder.modules() if hasattr(m, "lora_A"))


def in_inference_mode(encoder):
    with torch.inference_mode():
        encoder.encoder.layers[0].mlp.fc1.weight.mul_(1.5)


def moved(encoder):
    for parameter in encoder.parameters():
        parameter.data = parameter.data.clone()


def written_as_data(encoder):
    encoder.encoder.layers[1].mlp.fc2.weight.data.mul_(1.5)


def a_token_as_data(encoder):
    encoder.get_input_embeddings().weight.data[8] = 3.0


def other_data(encoder):
    bias = encoder.encoder.layers[0].mlp.fc1.bias
    bias.data = bias.data.flip(0)


def resized(encoder):
    encoder.resize_token_embeddings(WORDS + 1)
    encoder.get_input_embeddings().weight.data[8] = 3.0


def positions(encoder):
    encoder.embeddings.position_ids.copy_(encoder.embeddings.position_ids.flip(1))


def another_layer(encoder):
    fc2 = encoder.encoder.layers[0].mlp.fc2
    encoder.encoder.layers[0].mlp.fc2 = noisy(nn.Linear(*fc2.weight.shape[::-1]))


EDITS = {
    "in place": lambda encoder: encoder.encoder.layers[0].self_attn.q_proj.weight.mul_(1.5),
    "in place, in inference mode": in_inference_mode,
    "an optimizer's step": lambda encoder: encoder.final_layer_norm.bias.add_(1),
    "through .data": written_as_data,
    "a token through .data": a_token_as_data,
    "other .data": other_data,
    "moved": moved,
    "a new table": resized,
    "a buffer": positions,
    "another layer": another_layer,
    "fewer layers": lambda encoder: encoder.encoder.layers.pop(1),
    "a layer's number": lambda encoder: setattr(encoder.final_layer_norm, "eps", 0.5),
    "a setting": lambda encoder: encoder.set_attn_implementation("eager"),
    "a setting in place": lambda encoder: setattr(encoder.config, "output_hidden_states", True),
    "another dtype": lambda encoder: encoder.to(torch.float64),
    "an adapter": lora,
    "load_state_dict": lambda encoder: encoder.load_state_dict(
        {name: value * 1.5 for name, value in encoder.state_dict().items()}
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_after_an_edit_the_encoder_runs_again(clip, edit):
    clip(IDS)
    clip(IDS)
    assert counts(clip) == (1, 1, 0)
    EDITS[edit](clip)
    want = clip._call_impl(IDS)
    assert same(clip(IDS), want)
    assert same(clip(IDS), want)
    assert counts(clip) == (2, 2, 0)


def test_changed_settings_of_an_adapter_are_no_hit(clip):
    layer = lora(clip)
    want = clip(IDS).last_hidden_state

    def scaled():
        layer.scaling["default"] *= 0.5

    changes = [scaled, lambda: layer.enable_adapters(False), lambda: layer.merge()]
    for number, change in enumerate(changes, 2):
        change()
        got = clip(IDS)
        assert not torch.equal(got.last_hidden_state, want)
        assert same(got, clip._call_impl(IDS))
        assert counts(clip) == (0, number, 0)
    layer.unmerge()
    layer.enable_adapters(True)
    layer.scaling["default"] *= 2
    layer.scaling["default"] *= 0.5
    layer.scaling["default"] *= 2
    clip(IDS)
    clip(IDS)
    assert counts(clip)[0] >= 1


def test_patched_code_and_hooks_bypass_the_cache(clip, monkeypatch, caplog):
    def twice(module, given, output):
        return output * 2

    want = clip(IDS)
    layer = clip.encoder.layers[0].mlp
    handle = layer.register_forward_hook(twice)
    assert not same(clip(IDS), want)
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda h: h)
        assert not same(clip(IDS), want)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_clip.CLIPMLP, "forward", lambda self, h: h)
        assert not same(clip(IDS), want)
    assert counts(clip) == (0, 1, 3)
    assert same(clip(IDS), want)
    assert counts(clip) == (1, 1, 3)
    logged = [record.getMessage() for record in caplog.records]
    assert ["past the text cache" in line for line in logged] == [True] * 2
    assert "hook that wraps" in str(cache_of(clip))


def test_a_method_replaced_on_one_object_bypasses_the_cache():
    encoder = made("T5")
    want = encoder(IDS)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    own = attention.compute_bias
    attention.compute_bias = lambda *given, **more: 2 * own(*given, **more)
    assert not same(encoder(IDS), want)
    del attention.compute_bias
    assert same(encoder(IDS), want)
    assert counts(encoder) == (1, 1, 1)


def test_training_gradients_and_autocast_bypass_the_cache(clip):
    clip(IDS)
    with torch.enable_grad():
        clip(IDS).last_hidden_state.sum().backward()
    assert clip.get_input_embeddings().weight.grad is not None
    clip.requires_grad_(False)
    with torch.enable_grad():
        assert not clip(IDS).last_hidden_state.requires_grad  # no gradient is needed: a hit
    with torch.autocast("cpu"):
        half = clip(IDS).last_hidden_state
    assert same(clip(IDS), clip._call_impl(IDS))
    assert not torch.equal(half, clip(IDS).last_hidden_state)
    clip.encoder.layers[0].train()
    clip(IDS)
    assert counts(clip) == (3, 1, 3)
    reasons = str(cache_of(clip))
    assert all(why in reasons for why in ("gradients", "autocast", "training mode"))


def test_the_last_n_outputs_are_kept(clip):
    keep_texts({"text_encoder": clip}, 2)
    calls = [IDS + k for k in range(3)]
    for order, hit in ((0, 0), (1, 0), (0, 1), (2, 0), (0, 1), (1, 0), (2, 0)):
        before = counts(clip)[0]
        clip(calls[order].clamp(max=WORDS - 1))
        assert counts(clip)[0] - before == hit
    assert "2 of 2 kept" in str(cache_of(clip))


def test_threads_share_the_cache(clip):
    calls = [(IDS + k).clamp(max=WORDS - 1) for k in range(5)]
    want = [clip._call_impl(ids).last_hidden_state for ids in calls]
    keep_texts({"text_encoder": clip}, 3)
    wrong = []

    def work(seed):
        order = torch.randint(5, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            wrong.extend(k for k in order if not torch.equal(clip(calls[k])[0], want[k]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(counts(clip)) == 160
    assert len(cache_of(clip)._kept) <= 3


def test_a_hit_does_not_move_an_offloaded_encoder(clip, monkeypatch):
    """enable_model_cpu_offload's hook moves a model before a call; for a hit it must not."""
    before = nn.Linear(2, 2)
    _, first = cpu_offload_with_hook(before, "cpu")
    cpu_offload_with_hook(clip, "cpu", prev_module_hook=first)
    asked, sent = [], []

    def noted(hook, *given, own=CpuOffload.pre_forward, **more):
        asked.append(hook)
        return own(hook, *given, **more)

    monkeypatch.setattr(CpuOffload, "pre_forward", noted)
    monkeypatch.setattr(first, "offload", lambda: sent.append(1))
    want = clip(IDS)
    moved(clip)  # the weights moved to the device for the call, and back
    assert same(clip(IDS), want)
    assert (counts(clip), len(asked), len(sent)) == ((1, 1, 0), 1, 1)
    EDITS["in place"](clip)
    assert not same(clip(IDS), want)
    other_data(clip)
    clip(IDS)
    assert counts(clip) == (1, 3, 0)
    remove_hook_from_module(clip, recurse=True)
    clip(IDS)
    assert counts(clip)[2] == 0
    cpu_offload(clip, torch.device("cpu"))  # layer by layer
    assert same(clip(IDS), clip._call_impl(IDS))
    assert counts(clip)[2] == 1


def test_the_cache_keeps_no_weights_alive(clip):
    clip(IDS)
    gone = weakref.ref(clip.encoder.layers[0])
    clip.encoder.layers.pop(0)
    clip(IDS)
    gc.collect()
    assert gone() is None


def test_copies_have_no_cache_and_restore_leaves_no_trace(components, tmp_path):
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    encoder = pipe.text_encoder
    before = set(vars(encoder))
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    fastdiff.compile(pipe, text_cache=2)
    ids = IDS.clamp(max=len(pipe.tokenizer) - 1)
    want = encoder(ids)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert cache_of(twin) is None
        assert same(twin(ids), want)
    pipe.save_pretrained(tmp_path)
    again = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", torch_dtype=torch.float64)
    assert torch.equal(again.eval()(ids)[0], want[0])
    assert fastdiff.compile(pipe, text_cache=3).text_encoder is encoder
    assert (counts(encoder), cache_of(encoder).most) == ((0, 1, 0), 3)
    pipe.text_encoder = copy.deepcopy(encoder)
    fastdiff.restore(pipe)  # restores the replaced encoder, too
    assert set(vars(encoder)) == before
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_whole_pictures_and_the_report(components_sd3):
    pipe = StableDiffusion3Pipeline(**components_sd3(t5=True))
    pipe.set_progress_bar_config(disable=True)

    def drawn(prompt="red heart"):
        generator = torch.Generator().manual_seed(1)
        return pipe(
            prompt,
            num_inference_steps=2,
            generator=generator,
            output_type="latent",
            height=16,
            width=16,
            max_sequence_length=16,
        ).images

    fastdiff.compile(pipe, ignore=("text_encoder_2",))
    want, other = drawn(), drawn("dog")
    fastdiff.compile(pipe, text_cache=2, ignore=("text_encoder_2",))
    assert all(torch.equal(drawn(), want) for _ in range(2))
    assert torch.equal(drawn("dog"), other)
    rows = {part.name: part.why for part in fastdiff.report(pipe).parts}
    for name in ("text_encoder", "text_encoder_3"):
        assert rows[name] == "once per prompt; text cache: 3 hits, 3 computed, 2 of 2 kept"
    assert rows["text_encoder_2"] == "once per prompt"


def test_a_pipeline_without_a_supported_text_encoder_is_refused(components):
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    refused = (
        "Options.text_cache needs a text encoder of the classes CLIPTextModel, .*there is none"
    )
    with pytest.raises(UserError, match=refused):
        fastdiff.compile(pipe.unet, text_cache=2)
    pipe.text_encoder._compiled_call_impl = pipe.text_encoder._call_impl  # as torch.compile does
    with pytest.raises(UserError, match="text_encoder is compiled with torch.compile already"):
        fastdiff.compile(pipe, text_cache=2)
    pipe.text_encoder = nn.Identity()
    with pytest.raises(UserError, match="text_encoder is a Identity"):
        fastdiff.compile(pipe, text_cache=2)
    assert "unet" in str(fastdiff.report(pipe))
    assert not hasattr(pipe.unet, "_fastdiff_slot")
