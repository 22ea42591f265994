"""The trainer: its training pictures, its losses, and a killed run that resumes to the same end."""

import colorsys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from torch import nn
from typer.testing import CliRunner

import fastdiff
from tools import upscaled
from tools.train_demo import __main__ as main
from tools.train_demo import data, loop, networks, unconditional, upscale

CHARACTERS = ("❤", "🔴", "🟥", "⭐", "🍎", "🎈", "🚗", "🌻")


def synthetic_glyphs():
    """Made-up glyphs with the size, alpha and shading of the font's bitmaps."""
    for index, character in enumerate(CHARACTERS):
        bitmap = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
        pen = ImageDraw.Draw(bitmap)
        red, green, blue = (int(255 * c) for c in colorsys.hsv_to_rgb(index / 9, 0.8, 0.9))
        pen.ellipse((8 + index, 8, 128, 120 - 3 * index), (red, green, blue, 255))
        pen.rectangle((50, 30, 60, 40 + 5 * index), (red // 2, green // 2, blue // 2, 255))
        yield character, bitmap


@pytest.fixture(scope="module")
def glyphs():
    """A few of the font's glyphs if it is installed, otherwise made-up ones."""
    try:
        found = dict(data.read_glyphs(data.find_font()))
    except FileNotFoundError:
        return dict(synthetic_glyphs())
    return {character: found[character] for character in CHARACTERS}


@pytest.fixture
def made():
    return networks.untrained(0, torch.device("cpu"))


def hue_of(rgb):
    """The hue of an RGB colour in degrees, by Python's own conversion."""
    return 360 * colorsys.rgb_to_hsv(*(np.asarray(rgb) / 255))[0]


def test_pictures_have_names_white_corners_and_their_own_colour(glyphs):
    pictures = data.pictures(glyphs.items())
    names = [own[0] for own in pictures.names]
    assert "red heart" in names
    assert "sunflower" in names
    assert pictures.names[names.index("automobile")][:2] == ("automobile", "car")
    corners = pictures.images[:, :, :2, :2].float()
    assert corners[names.index("red circle")].min() > 250
    blue = pictures.images[names.index("blue circle"), :, 24:40, 24:40].float().mean((1, 2))
    assert abs(hue_of(blue.tolist()) - hue_of(data.COLOURS["blue"])) < 6


def test_held_out_pairs_are_never_shown(glyphs):
    shown = {name for own in data.pictures(glyphs.items()).names for name in own}
    assert not shown & {f"{colour} {thing}" for thing, colour in data.HELD_OUT}
    assert {"blue car", "green apple", "red star"} <= shown


@pytest.mark.parametrize("degrees", [0, 115, 215, 325])
def test_turn_hue_reaches_the_hue_and_spares_grey_and_alpha(degrees):
    bitmap = Image.new("RGBA", (40, 20), (200, 40, 60, 255))
    bitmap.paste((90, 90, 90, 128), (20, 0, 40, 20))
    turned = np.asarray(data.turn_hue(bitmap, degrees))
    difference = (hue_of(turned[5, 5, :3]) - degrees + 180) % 360 - 180
    assert abs(difference) < 3
    assert turned[5, 30].tolist() == [90, 90, 90, 128]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("pizza", True),
        ("watermelon", True),
        ("zipper-mouth face", True),
        ("one o’clock", False),
        ("OK button", False),
        ("woman dancing", False),
        ("right arrow", False),
    ],
)
def test_selection(name, kept):
    assert data.kept(name) is kept


def test_captions_read_back(made):
    ids = data.captions((("dog face", "dog"), ("pizza",)), made.tokenizer)
    assert ids.shape == (2, 12, 24)
    texts = [
        {made.tokenizer.decode(row, skip_special_tokens=True).strip() for row in own} for own in ids
    ]
    assert texts[0] == {
        "dog face", "a dog face", "dog face emoji", "dog", "a dog", "dog emoji"
    }  # fmt: skip
    assert texts[1] == {"pizza", "a pizza", "pizza emoji"}


def test_no_font_and_no_emoji_are_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.ttf: no such file"):
        data.find_font(tmp_path / "nothing.ttf")
    (tmp_path / "words.ttf").write_text("not a font at all")
    with pytest.raises(ValueError, match="words.ttf is not a TrueType or OpenType font"):
        list(data.read_glyphs(tmp_path / "words.ttf"))
    with pytest.raises(ValueError, match="1 glyphs and not one emoji"):
        data.pictures([("a", Image.new("RGBA", (136, 128)))])


# 8 s
@pytest.mark.product
def test_autoencoder_learns(glyphs, made, tmp_path):
    images = data.pictures(glyphs.items()).images[:8]
    _, before = networks.reconstruct(made.vae, images)

    def loss(generator):
        return networks.autoencoder_loss(made.vae, images, generator, batch=4)

    rows = loop.train(loop.Phase("a", made.vae, loss, 2e-3), loop.steps(40), tmp_path)
    _, after = networks.reconstruct(made.vae, images)
    losses = [row.loss for row in rows]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
    assert after > before + 3


def test_folding_leaves_pictures_and_whitens_latents(glyphs, made):
    images = data.pictures(glyphs.items()).images[:8]
    vae = made.vae
    before, _ = networks.reconstruct(vae, images)
    x = networks.scaled(images)
    variance = vae.encode(x).latent_dist.var
    deviation = networks.encode(vae, images).std((0, 2, 3))
    networks.fold_statistics(vae, networks.encode(vae, images))
    latents = networks.encode(vae, images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-4
    after, _ = networks.reconstruct(vae, images)
    assert (after.int() - before.int()).abs().max() <= 1
    ratio = vae.encode(x).latent_dist.var / variance
    assert torch.allclose(ratio.mean((0, 2, 3)), deviation**-2, rtol=1e-3)


def test_diffusion_loss_draws_stratified_steps_and_empties_a_tenth(made):
    seen = {}

    def text_encoder(ids):
        seen["ids"] = ids
        return (ids,)

    def unet(noisy, t, text):
        seen["t"] = t
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    stub = networks.Networks(made.tokenizer, text_encoder, None, unet, made.scheduler)
    captions = data.captions((("pizza",),), made.tokenizer)
    latents = torch.randn(1, 4, 16, 16)
    loss = networks.diffusion_loss(stub, latents, captions, torch.Generator().manual_seed(1), 1000)
    assert (torch.histc(seen["t"].float(), 10, 0, 1000) == 100).all()
    empty = made.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    assert 0.07 < (seen["ids"] == empty).all(1).float().mean() < 0.13
    # v = α·noise − σ·x, so its mean square over all steps is near 1 for white noise and latents.
    assert 0.9 < loss < 1.1


def test_a_killed_run_ends_like_an_undisturbed_one(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "TICKS", 5)  # a checkpoint every second step of ten
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    def run(folder, dies_at=None):
        folder.mkdir(exist_ok=True)
        # Another seed after the kill: the result must depend on the checkpoint only.
        made = networks.untrained(0 if not list(folder.iterdir()) else 9, torch.device("cpu"))
        captions = data.captions((("dog", "pet"),) * 6, made.tokenizer)
        taken = []

        def loss(generator):
            if len(taken) == dies_at:
                raise KeyboardInterrupt
            taken.append(1)
            return networks.diffusion_loss(made, latents, captions, generator, batch=2)

        both = nn.ModuleDict({"unet": made.unet, "text_encoder": made.text_encoder})
        rows = loop.train(loop.Phase("u", both, loss, 1e-3), loop.steps(10), folder)
        return rows, both.state_dict(), len(taken)

    whole, weights, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies_at=5)
    rows, resumed, taken = run(tmp_path / "killed")
    assert taken == 6  # five steps ran before the kill, four of them were saved
    assert [(row.step, row.loss, row.lr) for row in rows] == [
        (row.step, row.loss, row.lr) for row in whole
    ]
    assert rows[-1].step == 10
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name]), name
    again, _, taken = run(tmp_path / "killed")
    assert (again, taken) == (rows, 0)  # a finished phase is not trained further


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = nn.Linear(2, 1)

    def loss(generator):
        return module(torch.full((1, 2), torch.inf)).sum()

    with pytest.raises(FloatingPointError, match="at step 0"):
        loop.train(loop.Phase("n", module, loss, 1e-3), loop.steps(3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_written_is_a_pipeline_of_these_weights(made, tmp_path):
    networks.write_folder(made, tmp_path / "pipeline")
    networks.write_folder(made, tmp_path / "pipeline")  # replaces, and leaves nothing behind
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        written = getattr(pipe, part).state_dict()
        for name, tensor in getattr(made, part).state_dict().items():
            assert torch.equal(written[name], tensor.half().to(written[name].dtype)), (part, name)
    assert made.unet.dtype is torch.float32  # the networks in training keep their precision


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    (tmp_path / "unet.safetensors").write_bytes(b"precious")
    result = CliRunner().invoke(main.command, ["--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--resume" in result.output
    assert (tmp_path / "unet.safetensors").read_bytes() == b"precious"


def test_every_step_and_every_seed_draws_anew(tmp_path):
    module = nn.Linear(1, 1)
    drawn = []

    def loss(generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return module(torch.ones(1, 1)).sum()

    for seed in (0, 1):
        loop.train(loop.Phase(f"seed{seed}", module, loss, 1e-3), loop.steps(4), tmp_path, seed)
    assert len(set(drawn)) == 8


def test_the_unconditional_loss_is_algorithm_1():
    """A network that knows the picture computes the noise by the paper's schedule: loss near 0."""
    picture = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    alphas = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()
    seen = []

    def knows(noisy, t):
        seen.append(t)
        kept = alphas[t].view(-1, 1, 1, 1)
        noise = (noisy - kept.sqrt() * (picture / 127.5 - 1)) / (1 - kept).sqrt()
        return SimpleNamespace(sample=noise)

    images, generator = picture.to(torch.uint8), torch.Generator().manual_seed(1)
    assert unconditional.loss(knows, images, generator, batch=500) < 1e-4
    assert (torch.histc(seen[0].float(), 10, 0, 1000) == 50).all()
    blind = unconditional.loss(
        lambda noisy, t: SimpleNamespace(sample=torch.zeros_like(noisy)), images, generator, 500
    )
    assert abs(blind - 1) < 0.02  # the noise's own variance


def trained(*options):
    """The losses that a run of the command prints, and its arguments."""
    told = [*options, "--batch", "8", "--device", "cpu"]
    result = CliRunner().invoke(main.command, told)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()[1:-1]
    return [float(line.split("loss")[1].split()[0]) for line in lines], told


def test_a_short_unconditional_run_learns_and_is_drawn_by_fastdiff(glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_font", lambda given: given)
    monkeypatch.setattr(data, "read_glyphs", lambda font: glyphs.items())
    monkeypatch.setattr(loop, "minutes", lambda minutes: loop.steps(15))
    monkeypatch.setattr(unconditional, "STEPS", 2)
    monkeypatch.setitem(unconditional.CONFIG, "block_out_channels", (16, 32))
    losses, _ = trained("--unconditional", "--out", str(tmp_path))
    assert Image.open(tmp_path / "sheet.png").size == (1024, 288)
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    pipe = DDPMPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        return pipe(2, torch.Generator().manual_seed(0), 10, output_type="np").images

    eager = drawn()
    fastdiff.compile(pipe)
    assert np.abs(drawn() - eager).max() < 1e-4
    assert "loop       fastdiff  1 loop" in str(fastdiff.report(pipe))


def kept_by(first, last):
    """ᾱ of a thousand steps whose betas' roots are evenly spread."""
    return torch.from_numpy(np.cumprod(1 - np.linspace(first**0.5, last**0.5, 1000) ** 2)).float()


def test_the_upscaling_loss_is_of_the_velocity_beside_a_picture_with_its_level_of_noise(made):
    """Who knows the picture can name the velocity; the small one has the noise that is said."""
    generator, seen = torch.Generator().manual_seed(2), {}
    small = torch.randint(256, (2, 3, 16, 16), generator=generator).to(torch.uint8)
    latents, texts = (torch.randn(2, 4, n, 16, generator=generator) for n in (16, 5))
    known = upscale.Pairs(small, latents[:1].expand(2, -1, -1, -1), texts, torch.zeros(5, 16))

    def knows(x, t, text, class_labels):
        seen.update(x=x, t=t, text=text, level=class_labels)
        kept = kept_by(0.00085, 0.02)[t].view(-1, 1, 1, 1)
        noise = (x[:, :4] - kept.sqrt() * latents[:1]) / (1 - kept).sqrt()
        return SimpleNamespace(sample=kept.sqrt() * noise - (1 - kept).sqrt() * latents[:1])

    pipe = SimpleNamespace(
        unet=knows,
        scheduler=made.scheduler,
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        config=SimpleNamespace(max_noise_level=49),
    )
    assert upscale.loss(pipe, known, torch.Generator().manual_seed(1), batch=1000) < 1e-4
    assert (torch.histc(seen["t"].float(), 10, 0, 1000) == 100).all()
    assert seen["level"].unique().tolist() == list(range(50))
    empty = (seen["text"] == 0).all(2).all(1)
    assert 0.07 < empty.float().mean() < 0.13
    # a text tells which of the two pictures stands beside the latents
    which = torch.cdist(seen["text"].flatten(1), texts.flatten(0, 1).flatten(1)).argmin(1) // 4
    kept = kept_by(0.0001, 0.02)[seen["level"]].view(-1, 1, 1, 1)
    noise = (seen["x"][:, 4:] - kept.sqrt() * (small / 127.5 - 1)[which]) / (1 - kept).sqrt()
    assert abs(noise[~empty].std() - 1) < 0.02
    assert abs(noise[~empty].mean()) < 0.02


def test_copies_are_moved_a_little_on_white_and_every_other_one_is_mirrored():
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    image[..., 30, 10] = 0
    first, *others = upscale.copies(image, seed=0)
    assert torch.equal(first, image[0])
    assert len(others) == upscale.COPIES - 1
    for index, other in enumerate(others):
        assert (other != 255).sum() == 3
        y, x = (int(at[0]) for at in (other[0] == 0).nonzero(as_tuple=True))
        assert abs(y - 30) <= upscale.SHIFT
        assert abs((x if index % 2 else 63 - x) - 10) <= upscale.SHIFT


# 4 s
@pytest.mark.product
def test_a_short_upscaling_run_learns_and_writes_its_network(glyphs, tmp_path, monkeypatch):
    some = {**glyphs, "🆗": glyphs["❤"]}  # a button, which is left out of training
    monkeypatch.setattr(data, "find_font", lambda given: given)
    monkeypatch.setattr(data, "read_glyphs", lambda font: some.items())
    monkeypatch.setattr(data, "recolours", lambda known: ())
    monkeypatch.setattr(loop, "minutes", lambda minutes: loop.steps(30))
    monkeypatch.setattr(upscale, "COPIES", 2)
    monkeypatch.setitem(upscale.CONFIG, "block_out_channels", (16, 32))
    losses, told = trained("--upscale", "--out", str(tmp_path))
    assert Image.open(tmp_path / "sheet.png").size == (1024, 576)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert unet.config.block_out_channels == [16, 32]
    both = CliRunner().invoke(main.command, ["--unconditional", *told, "--resume"])
    assert both.exit_code == 2
    assert "choose one" in both.output


def test_the_page_of_the_upscaler_is_drawn_and_measured(glyphs, tmp_path, monkeypatch, capsys):
    some = {"🆗": glyphs["❤"], "🆒": glyphs["🚗"], "🍕": glyphs["🌻"]}  # a pizza is learnt from
    monkeypatch.setattr(data, "find_font", lambda given: given)
    monkeypatch.setattr(data, "read_glyphs", lambda font: some.items())
    upscaled.main(tmp_path / "sheet.png", None)
    assert Image.open(tmp_path / "sheet.png").size == (1024, 576)
    count, bicubic, _ = capsys.readouterr().out.splitlines()
    assert count == "2 pictures, mean"
    truth = data.left_out(some.items()).images.permute(0, 2, 3, 1).numpy()
    small = truth.reshape(2, 16, 4, 16, 4, 3).mean((2, 4)).round().astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(s).resize((64, 64), Image.Resampling.BICUBIC)) for s in small
    ]
    errors = np.mean((np.stack(large) / 255 - truth / 255) ** 2, axis=(1, 2, 3))
    assert f" {np.mean(-10 * np.log10(errors)):.2f} dB" in bicubic
