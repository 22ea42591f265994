"""DiT against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from small import DIT, noisy

from fastdiff.models import Loan, Unsupported
from fastdiff.models.dit import Conditions, borrow_dit
from fastdiff.runtime.denoiser import denoiser

KINDS = {
    "with a variance": {},
    "without one": {"out_channels": 4, "attention_bias": False},
    "of other patches": {"patch_size": 1, "sample_size": 5, "norm_eps": 1e-3},
}


def network_of(module):
    return denoiser(borrow_dit(module, Loan(module)))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions(kind, batch, budget):
    eager = noisy(DiTTransformer2DModel(**DIT | KINDS[kind]))
    network, side = network_of(copy.deepcopy(eager)), eager.config.sample_size
    times, labels = torch.tensor([999, 301, 0]), torch.tensor([0, 1000, 207])
    budget(
        lambda x, t, labels: network(x, t, Conditions(labels)),
        eager,
        *(torch.randn(batch, 4, side, side), times[:batch], labels[:batch]),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, budget, tmp_path):
    """A network that is loaded in half precision keeps its positions in float32."""
    noisy(DiTTransformer2DModel(**DIT)).save_pretrained(tmp_path)
    eager = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    assert eager.pos_embed.pos_embed.dtype == torch.float32
    network = network_of(copy.deepcopy(eager))
    budget(
        lambda x, t, labels: network(x, t, Conditions(labels)),
        eager,
        *(torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([301, 301]), torch.tensor([5, 1000])),
    )


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"latents": torch.zeros(1, 4, 8, 10)}, "latents of .* are not 8 by 8"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, "latents of .* are not 8 by 8"),
        ({"labels": None}, "class_labels is missing"),
        ({"labels": torch.tensor([1.0])}, "class_labels are torch.float32"),
        ({"labels": torch.tensor([1, 2])}, "class_labels is for 2 pictures"),
    ],
)
def test_wrong_inputs_are_refused(given, what):
    network = borrow_dit(net := noisy(DiTTransformer2DModel(**DIT)), Loan(net))
    known = {"latents": torch.zeros(1, 4, 8, 8), "labels": torch.tensor([1])} | given
    with pytest.raises(Unsupported, match=what):
        network.check(known["latents"], Conditions(known["labels"]))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"activation_fn": "gelu"}, "a GELU of kind 'none'"),
        ({"norm_elementwise_affine": True}, "a LayerNorm with weight and bias"),
    ],
)
def test_other_architectures_are_refused(config, what):
    net = DiTTransformer2DModel(**DIT | config).eval()
    with pytest.raises(Unsupported, match=what):
        borrow_dit(net, Loan(net))
