"""Large pictures of a VAE: decoded exactly in strips, in diffusers' tiles, or in one piece."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL

import fastdiff
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.families import vae as family
from fastdiff.models.vae import Decoder

EXACT = fastdiff.Options(vae_tiling="exact")


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


@pytest.fixture
def cut(monkeypatch):
    """The byte limits with which strips were decoded; pictures count as large from 1 MiB."""
    given, run = [], Decoder.run_in_strips

    def noting(self, x, bytes):
        given.append(bytes)
        return run(self, x, bytes)

    monkeypatch.setattr(Decoder, "run_in_strips", noting)
    monkeypatch.setattr(family, "LARGE", 1 << 20)
    return given


def why(target, part):
    return next((p.why for p in fastdiff.report(target).parts if p.name == part), None)


def within_budget(budget, vae, eager, latents):
    budget(lambda z: vae.decode(z, return_dict=False)[0], Decoding(eager), latents)


class Decoding(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        return self.vae.decode(z, return_dict=False)[0]


def test_exact_decodes_only_large_pictures_in_strips(vae, cut, budget):
    eager = copy.deepcopy(vae)
    fastdiff.compile(vae, EXACT)
    for size in ((1, 4, 8, 8), (2, 4, 31, 17), (1, 4, 40, 48)):
        within_budget(budget, vae, eager, torch.randn(size))
    whole = [rows * columns * 4 * 192 * 4 for rows, columns in ((31, 17), (40, 48))]
    assert cut == [1 << 20, int(family.SHARE * whole[1])]
    assert slot_of(vae.decoder).fast == 3
    assert "pictures above" in why(vae, "vae.decoder")


def test_by_default_strips_are_used_only_when_memory_is_short(vae, cut, budget, monkeypatch):
    eager = copy.deepcopy(vae)
    fastdiff.compile(vae)
    latents = torch.randn(1, 4, 40, 48)
    within_budget(budget, vae, eager, latents)
    assert not cut
    slot = slot_of(vae.decoder)

    def short(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slot.network, "run", short)
    within_budget(budget, vae, eager, latents)
    assert len(cut) == 1
    assert "in strips since a GPU's memory was short" in why(vae, "vae.decoder")
    monkeypatch.setattr(slot_of(vae.encoder).network, "run", short)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        vae.encode(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("options", [fastdiff.Options(), EXACT], ids=["auto", "exact"])
def test_diffusers_tiling_is_honoured_and_reported(vae, cut, options, budget):
    """The picture differs as in diffusers, and each tile runs in the compiled decoder."""
    eager = copy.deepcopy(vae)
    fastdiff.compile(vae, options)
    latents = torch.randn(2, 4, 20, 20)
    with torch.no_grad():
        untiled = eager.decode(latents).sample
    assert why(vae, "vae.tiling") is None
    for model in (vae, eager):
        model.enable_tiling()
        model.enable_slicing()
    within_budget(budget, vae, eager, latents)
    with torch.no_grad():
        assert (vae.decode(latents).sample - untiled).abs().max() > 1e-2
    assert "changes pictures larger" in why(vae, "vae.tiling")
    assert "all unchanged" in why(vae, "vae.slicing")
    assert not cut  # a tile is small
    vae.disable_tiling()
    assert why(vae, "vae.tiling") is None


def test_wrong_options_are_refused(vae, unet):
    with pytest.raises(UserError, match="vae_tiling is 'blended'; choose auto, exact"):
        fastdiff.Options(vae_tiling="blended")
    with pytest.raises(UserError, match='vae_tiling is "exact", but there is no autoencoder'):
        fastdiff.compile(unet, EXACT)
    fastdiff.compile(vae)
    with pytest.raises(UserError, match="decoder is compiled with another vae_tiling already"):
        fastdiff.compile(vae, EXACT)
    fastdiff.restore(vae)
    fastdiff.compile(vae, EXACT)
    fastdiff.compile(vae, EXACT)
