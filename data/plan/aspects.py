"""Shapes of the declared scheme: for each resolution the height and width of every aspect (Open-Sora sheet §5.2)."""

from __future__ import annotations

import math
import re

from core.errors import UserError, did_you_mean

Aspects = dict[str, tuple[int, int]]
"""Aspect as it is called → height, width."""

NAMED = {
    "144p": (
        36864,
        "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 "
        "235x156 256x144 263x139 271x135 277x132",
    ),
    "240p": (
        102240,
        "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 "
        "392x262 426x240 440x232 452x226 462x222",
    ),
    "360p": (
        230400,
        "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 "
        "588x392 640x360 660x350 678x340 692x332",
    ),
    "480p": (
        409920,
        "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 "
        "784x522 854x480 880x466 906x454 924x444",
    ),
    "720p": (
        921600,
        "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
        "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    ),
    "1080p": (
        2073600,
        "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
        "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    ),
}
"""1.2: nominal pixels, then the shapes in the order of NAMED_ASPECTS; the table is not the outcome of one formula."""
NAMED_ASPECTS = "0.38 0.43 0.48 0.50 0.53 0.54 0.56 0.62 0.67 0.75 1.00 1.33 1.50 1.78 1.89 2.00 2.08"
SQUARE = {"256": 16, "512": 32, "1024": 64, "2048": 128}
"""1.2: pixels of one step in SQUARE_STEPS."""
SQUARE_STEPS = (
    "0.25=8x32 0.26=8x31 0.27=8x30 0.28=8x29 0.32=9x28 0.33=9x27 0.35=9x26 0.4=10x25 0.42=10x24 "
    "0.48=11x23 0.5=11x22 0.52=11x21 0.57=12x21 0.6=12x20 0.68=13x19 0.72=13x18 0.78=14x18 0.82=14x17 "
    "0.88=15x17 0.94=15x16 1.0=16x16 1.07=16x15 1.13=17x15 1.21=17x14 1.29=18x14 1.38=18x13 1.46=19x13 "
    "1.67=20x12 1.75=21x12 2.0=22x11 2.09=23x11 2.4=24x10 2.5=25x10 2.89=26x9 3.0=27x9 3.11=28x9 "
    "3.62=29x8 3.75=30x8 3.88=31x8 4.0=32x8"
)
RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
"""2.0: width to height; their transposes follow."""
GRID = 16
"""2.0: sides are multiples of this: the autoencoder's stride times the patch."""


def aspects(name: str, rules: str) -> tuple[int, Aspects]:
    """Nominal pixels and the shapes of a resolution. Raises UserError for a name that the rules do not know."""
    if rules == "2.0":
        return _free(name)
    if name in NAMED:
        pixels, shapes = NAMED[name]
        return pixels, dict(zip(NAMED_ASPECTS.split(), map(_sides, shapes.split()), strict=True))
    if name in SQUARE:
        step = SQUARE[name]
        pairs = (pair.split("=") for pair in SQUARE_STEPS.split())
        shapes_of = {key: (high * step, wide * step) for key, (high, wide) in ((k, _sides(v)) for k, v in pairs)}
        return int(name) ** 2, shapes_of
    known = [*NAMED, *SQUARE]
    raise UserError(
        f"no resolution {name!r} in the rules of 1.2{did_you_mean(name, known)}; there are {', '.join(known)}"
    )


def _sides(text: str) -> tuple[int, int]:
    high, _, wide = text.partition("x")
    return int(high), int(wide)


def _free(name: str) -> tuple[int, Aspects]:
    """`256px` is a square of that side, `720p` as many pixels as 16:9 of that height."""
    match = re.fullmatch(r"(\d{2,5})(px|p)", name)
    if match is None:
        raise UserError(f"no resolution {name!r} in the rules of 2.0; expected for example 256px or 720p")
    pixels = int(match[1]) ** 2 * (16 if match[2] == "p" else 9) // 9
    shapes: Aspects = {}
    for ratio in RATIOS:
        wide, high = map(float, ratio.split(":"))
        _add(shapes, ratio, _on_grid(pixels, wide / high))
    for ratio, (high_side, wide_side) in list(shapes.items()):
        _add(shapes, ":".join(reversed(ratio.split(":"))), (wide_side, high_side))
    return pixels, shapes


def _add(shapes: Aspects, ratio: str, shape: tuple[int, int]) -> None:
    """Of aspects with one shape, the first."""
    if ratio not in shapes and shape not in shapes.values():
        shapes[ratio] = shape


def _on_grid(pixels: int, ratio: float) -> tuple[int, int]:
    """Sides cut to the grid, then one of them moved by a step where that brings the area nearer."""
    wide = int(math.sqrt(pixels * ratio)) // GRID * GRID
    high = int(pixels / wide) // GRID * GRID
    near = [(high, wide), (high - GRID, wide), (high + GRID, wide), (high, wide - GRID), (high, wide + GRID)]
    return min(near, key=lambda sides: abs(sides[0] * sides[1] - pixels))
