"""What people call a style: names, synonyms, adjectives and the sentences `mini` was trained on."""

from __future__ import annotations

import string

import numpy as np

NAMES: dict[str, tuple[str, ...]] = {
    "photo": ("photo", "photograph", "realistic photo", "unchanged", "camera picture"),
    "ink": ("ink drawing", "ink", "brush ink", "sumi-e", "black and white ink drawing", "manga ink"),
    "toon": ("cartoon", "toon", "cel shading", "anime", "animated film", "cel shaded"),
    "pencil": ("pencil drawing", "pencil", "pencil sketch", "graphite drawing", "sketch", "hatching"),
    "woodcut": ("woodcut", "ukiyo-e", "woodblock print", "japanese print", "hokusai", "japanese woodblock print"),
    "comic": ("comic", "comic book", "halftone", "pop art", "halftone comic", "graphic novel"),
    "neon": ("neon", "neon lights", "glowing neon", "cyberpunk neon", "neon glow", "cyberpunk"),
    "engraving": ("engraving", "etching", "banknote engraving", "line engraving", "copperplate engraving"),
    "oil": ("oil painting", "oil", "oil on canvas", "oil portrait", "rembrandt", "baroque oil painting"),
    "watercolour": ("watercolour", "watercolor", "watercolour painting", "watercolor painting", "aquarelle", "wash"),
    "pointillism": ("pointillism", "pointillist painting", "seurat", "dots", "divisionism"),
    "glass": ("stained glass", "stained glass window", "cathedral window", "leaded glass", "glass mosaic"),
    "pastel": ("pastel", "chalk pastel", "pastel drawing", "soft pastel drawing", "chalk drawing", "chalk"),
    "impressionist": (
        "impressionist painting",
        "impressionism",
        "van gogh",
        "monet",
        "impressionist",
        "thick brush strokes",
    ),
}

BOLD_WORDS = ("bold", "thick lines", "thick", "broad strokes", "strong")
FINE_WORDS = ("fine", "thin lines", "delicate", "detailed", "fine lines")
TONES: dict[str, tuple[str, ...]] = {
    "warm": ("warm", "warm palette", "golden", "sunset colours", "warm colours"),
    "cool": ("cool", "cold", "cool palette", "cold colours", "blue palette"),
    "dark": ("dark", "night", "moody", "gloomy"),
    "bright": ("bright", "light", "airy", "sunny"),
    "vivid": ("vivid", "colourful", "colorful", "saturated", "vibrant"),
    "muted": ("muted", "pale", "faded", "desaturated"),
    "mono": ("monochrome", "grayscale", "colourless"),
    "soft": ("soft", "dreamy", "gentle", "hazy"),
}
SCENES = (
    "a rainy city", "a portrait", "a woman", "a man", "a face", "two people", "a street", "a forest",
    "the sea", "a dog", "a cat", "mountains", "a quiet room", "flowers", "a car", "a landscape", "a crowd",
    "a child", "the world", "a house", "a garden", "a river", "a beach", "the sky", "a castle", "a horse",
    "a bird", "my room", "a person", "people",
)  # fmt: skip
FRAMES = (
    "{style}",
    "{style}",
    "a {style}",
    "{style} of {scene}",
    "a {style} of {scene}",
    "{scene}, {style}",
    "{style} style",
    "in the style of {style}",
    "make it a {style}",
    "{style}, masterpiece",
    "turn this into a {style}",
)


def sentence(style: str, words: list[str], rng: np.random.Generator) -> str:
    """One way of asking for a style with some adjectives."""
    name = str(rng.choice(NAMES[style]))
    before = [w for w in words if rng.random() < 0.6]
    after = [w for w in words if w not in before]
    phrase = " ".join([*before, name]) if rng.random() < 0.7 else ", ".join([*before, name])
    scene = str(rng.choice(SCENES))
    if rng.random() < 0.15:  # words it will never have seen must not disturb it
        scene += " " + "".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 9)))
    text = str(rng.choice(FRAMES)).format(style=phrase, scene=scene)
    return ", ".join([text, *after])


def corpus() -> list[str]:
    """Every word the vocabulary should hold whole."""
    fixed = [frame.format(style="", scene="") for frame in FRAMES] + ["and , with the at of mixed half blend very"]
    groups = [*NAMES.values(), *TONES.values(), BOLD_WORDS, FINE_WORDS, SCENES]
    return fixed + [phrase for group in groups for phrase in group]
