"""The pictures and their names: selected Noto Color Emoji, also recoloured, on white, 64×64."""

import io
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 64
TEMPLATES = ("{}", "a {}", "{} emoji")
NAMES_EACH = 4  # names per picture; fewer are repeated, so that captions stack

# Left out by a word in the name: pictures that a tiny network cannot tell apart (buttons, arrows,
# clocks, phases of one thing), lettering, and people, whom it would only blur.
_LEFT_OUT = re.compile(
    r"""\b(
    button | arrows? | sign | symbol | mark | suit | keycap | input | japanese |
    clock | thirty | banknote | skin | tone | small | medium | restroom | room |
    pedestrians | smoking | littering | water | bicycles | entry | potable |
    prohibited | hands? | fingers? | fist | index | thumbs | salute | horns |
    gesture | handshake | biceps | pinching | lady | palms? | selfie | leg | foot |
    ear | nose | mouth | tongue | lips | hair | bald | wing | lungs | anatomical |
    nail | person | people | man | woman | men | women | boy | girl | baby | child |
    adult | older | old | family | couple | wedding | kiss | worker | guard |
    detective | officer | prince | princess | superhero | supervillain | mage |
    fairy | vampire | merperson | elf | genie | zombie | ninja | troll | santa | mrs |
    police | dancing | busts? | silhouette | snowboarder | skier | golfing |
    surfing | biking | breast | massage | wearing | veil | turban | beard | heads? |
    office | bank | hotel | hospital | school | store | factory | castle | church |
    mosque | synagogue | shrine | temple | kaaba | stadium | houses? | building |
    cityscape | post | hut | dolls | worship | station | bridge | night | sunset |
    sunrise | dusk | foggy | tower | statue | moai | fuji | map | camping | chart |
    mailbox | envelope | inbox | outbox | tray | card | file | folder | page |
    bookmark | calendar | notepad | speaker | mobile | antenna | bars | disk | dvd |
    waxing | waning | quarter | meridians | one | two | three | four | five | six |
    seven | eight | nine | ten | eleven | twelve | eighteen | tram | train | metro |
    railway | locomotive | monorail | oncoming | trolleybus | minibus | bus |
    rail | copyright | registered | information | multiply | plus | minus |
    divide | infinity | om | khanda | cross | david | crescent | yin | dharma |
    peace | gender | female | male | transgender | recycling | asterisk | loop |
    wavy | hundred | anger | zzz | placard | identification | elevator |
    wireless | customs | control | claim | left | aries | taurus | gemini | cancer |
    leo | virgo | libra | scorpio | sagittarius | capricorn | aquarius | pisces |
    ophiuchus | currency | dollar | yen | euro | pound | receipt | score | atm |
    cinema | no | under | flags? | black | white | lock | locked | unlocked | equals |
    exclamation | question | bubble | wheelchair
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)
_KEPT = frozenset(  # kept in spite of such a word
    name.strip()
    for name in """
    alarm clock, angry face with horns, baby bottle, baby chick, black cat, black circle,
    black heart, bus, castle, exploding head, face with open mouth, face with tongue,
    face without mouth, frowning face with open mouth, full moon, house, lady beetle, locked,
    locomotive, police car, police car light, Santa Claus, smiling face with horns,
    snow-capped mountain, squinting face with tongue, star and crescent, sunrise, water buffalo,
    water pistol, water wave, white circle, white heart, winking face with tongue,
    zipper-mouth face
    """.replace("\n", " ").split(",")
)

COLOURS = {  # sRGB of a flat shape
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (30, 110, 220),
    "purple": (150, 70, 200),
    "pink": (245, 130, 180),
    "brown": (150, 90, 60),
    "black": (45, 45, 50),
    "grey": (150, 155, 160),
    "light blue": (110, 200, 245),
}
_SHAPES = {
    "circle": "🔴",
    "square": "🟥",
    "heart": "❤",
    "star": "⭐",
    "diamond": "🔶",
    "triangle": "🔺",
}
_HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 48,
    "green": 115,
    "blue": 215,
    "purple": 280,
    "pink": 325,
}
_OBJECTS = {
    "apple": "🍎", "balloon": "🎈", "car": "🚗", "book": "📕", "dress": "👗", "t-shirt": "👕",
    "cap": "🧢", "scarf": "🧣", "handbag": "👜", "backpack": "🎒", "gift": "🎁", "bell": "🔔",
    "guitar": "🎸", "crown": "👑", "butterfly": "🦋", "fish": "🐟", "bird": "🐦", "frog": "🐸",
    "octopus": "🐙", "whale": "🐳", "mushroom": "🍄", "gloves": "🧤", "rose": "🌹", "droplet": "💧",
    "chair": "🪑", "airplane": "✈",
}  # fmt: skip
HELD_OUT = frozenset(  # never trained on, to test whether colours and objects compose
    {
        ("apple", "blue"), ("apple", "purple"), ("balloon", "green"), ("balloon", "yellow"),
        ("car", "purple"), ("car", "green"), ("book", "pink"), ("dress", "orange"),
        ("butterfly", "red"), ("fish", "purple"), ("frog", "blue"), ("rose", "green"),
        ("square", "pink"), ("star", "purple"), ("circle", "pink"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """`images` [N, 3, 64, 64] uint8; `names[i]`: the names of picture i."""

    images: Tensor
    names: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.names)


def find_font(given: Path | None = None) -> Path:
    """The Noto Color Emoji file: `given`, or what fontconfig finds. FileNotFoundError otherwise."""
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"--font {given}: no such file")
        return given
    if shutil.which("fc-match"):
        command = ["fc-match", "--format=%{file}", "Noto Color Emoji"]
        found = Path(subprocess.run(command, capture_output=True, text=True).stdout)
        if found.is_file() and "emoji" in found.name.lower():
            return found
    raise FileNotFoundError(
        "fontconfig knows no Noto Color Emoji: install it (Debian: fonts-noto-color-emoji) "
        "or name the file with --font"
    )


def read_glyphs(font: Path) -> Iterator[tuple[str, Image.Image]]:
    """(character, RGBA bitmap) of every single-codepoint glyph. ValueError without a CBDT table."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        opened = TTFont(font, lazy=True)
    except TTLibError as error:
        raise ValueError(f"{font} is not a TrueType or OpenType font: {error}") from error
    with opened as table:
        if "CBDT" not in table:
            raise ValueError(
                f"{font} has no colour bitmaps: got tables {', '.join(table.keys())}, expected CBDT"
            )
        bitmaps = table["CBDT"].strikeData[0]
        for codepoint, glyph in table.getBestCmap().items():
            if glyph in bitmaps:
                bitmap = Image.open(io.BytesIO(bitmaps[glyph].imageData))
                yield chr(codepoint), bitmap.convert("RGBA")


def names_of(character: str) -> tuple[str, ...]:
    """The English names of `character`, most official first; () if it is not an emoji."""
    from emoji import EMOJI_DATA

    entry: dict[str, Any] = EMOJI_DATA.get(character + "\ufe0f") or EMOJI_DATA.get(character) or {}
    names = [entry["en"], *entry.get("alias", ())] if entry else []
    return tuple(dict.fromkeys(name.strip(":").replace("_", " ") for name in names))


def kept(name: str) -> bool:
    """Whether to train on the picture called `name`."""
    return name in _KEPT or not _LEFT_OUT.search(name)


def on_white(bitmap: Image.Image) -> np.ndarray:
    """An RGBA bitmap centred on a white square, [64, 64, 3] uint8."""
    side = max(bitmap.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    small = square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def tint(bitmap: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A flat shape in another `colour` (sRGB), with its shading."""
    rgba = np.asarray(bitmap, dtype=np.float32)
    light = rgba[..., :3].max(-1)
    usual = np.median(light[rgba[..., 3] > 128])
    painted = np.clip(light[..., None] / usual * np.asarray(colour, np.float32), 0, 255)
    return _with_alpha(painted, bitmap)


def turn_hue(bitmap: Image.Image, degrees: float) -> Image.Image:
    """The same object with its main hue at `degrees`; greys stay grey."""
    hsv = np.asarray(bitmap.convert("RGB").convert("HSV"), dtype=np.float32)
    angle = hsv[..., 0] * (2 * np.pi / 256)
    weight = hsv[..., 1] * np.asarray(bitmap)[..., 3]
    main = np.angle((weight * np.exp(1j * angle)).sum())
    turned = hsv.copy()
    turned[..., 0] = (hsv[..., 0] + (np.radians(degrees) - main) * (256 / (2 * np.pi))) % 256
    rgb = Image.fromarray(turned.astype(np.uint8), mode="HSV").convert("RGB")
    return _with_alpha(np.asarray(rgb), bitmap)


def _with_alpha(rgb: np.ndarray, bitmap: Image.Image) -> Image.Image:
    painted = Image.fromarray(rgb.astype(np.uint8)).convert("RGBA")
    painted.putalpha(bitmap.getchannel("A"))
    return painted


def recolours(glyphs: dict[str, Image.Image]) -> Iterator[tuple[str, Image.Image]]:
    """(caption, RGBA bitmap) of each shape and object in each colour that is not held out."""
    for shape, character in _SHAPES.items():
        for colour, rgb in COLOURS.items():
            if character in glyphs and (shape, colour) not in HELD_OUT:
                yield f"{colour} {shape}", tint(glyphs[character], rgb)
    for thing, character in _OBJECTS.items():
        for colour, degrees in _HUES.items():
            if character in glyphs and (thing, colour) not in HELD_OUT:
                yield f"{colour} {thing}", turn_hue(glyphs[character], degrees)


def pictures(glyphs: Iterable[tuple[str, Image.Image]]) -> Pictures:
    """Every selected glyph, and the recolours. ValueError if there are none."""
    known = dict(glyphs)
    rows = [(names, bitmap) for names, bitmap in _named(known) if kept(names[0])]
    rows += [((caption,), bitmap) for caption, bitmap in recolours(known)]
    if not rows:
        raise ValueError(f"got {len(known)} glyphs and not one emoji with a name among them")
    return _stacked(rows)


def left_out(glyphs: Iterable[tuple[str, Image.Image]]) -> Pictures:
    """Every glyph with a name that `pictures` leaves out, to test on what training never shows.

    ValueError if there are none.
    """
    rows = [(names, bitmap) for names, bitmap in _named(dict(glyphs)) if not kept(names[0])]
    if not rows:
        raise ValueError("every glyph with a name is selected: none is left to test on")
    return _stacked(rows)


def _named(glyphs: dict[str, Image.Image]) -> Iterator[tuple[tuple[str, ...], Image.Image]]:
    named = ((names_of(character), bitmap) for character, bitmap in glyphs.items())
    return ((names, bitmap) for names, bitmap in named if names)


def _stacked(rows: Sequence[tuple[tuple[str, ...], Image.Image]]) -> Pictures:
    stacked = np.stack([on_white(bitmap) for _, bitmap in rows])
    images = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    return Pictures(images, tuple(names for names, _ in rows))


def captions(names: tuple[tuple[str, ...], ...], tokenizer: Any) -> Tensor:
    """Token ids of each picture's names in each template, int64 [N, 4 names · 3 templates, L]."""
    texts = [
        template.format(name)
        for own in names
        for name in (own * NAMES_EACH)[:NAMES_EACH]
        for template in TEMPLATES
    ]
    ids: Tensor = tokenizer(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return ids.view(len(names), NAMES_EACH * len(TEMPLATES), -1)
