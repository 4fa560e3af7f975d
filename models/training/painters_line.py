"""Painters of the line and tone family: what a pen, a pencil, a burin or a halftone plate makes of a picture.

Every painter is local (it sees at most about 48 pixels around a point), has no randomness, and ties its texture to
the 8-pixel grid, so that a crop painted alone equals the crop of the painted picture and a video does not crawl.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from models.training.brushwork import GRID, Map, Picture, blur, luma, mix, quantise, screen, smoothstep

Painter = Callable[..., Picture]

BLACK_INK = (0.07, 0.06, 0.08)
WARM_WHITE = (0.98, 0.96, 0.91)
GRAPHITE = (0.20, 0.20, 0.23)
DRAWING_PAPER = (0.97, 0.965, 0.95)
BURIN_INK = (0.15, 0.10, 0.09)
CREAM = (0.96, 0.92, 0.81)
WOODBLOCKS = np.array(  # black, Prussian indigo, mid blue, pale blue, vermilion, ochre, flesh, cream, moss
    [[28, 27, 36], [32, 58, 104], [82, 124, 156], [176, 200, 202], [190, 72, 50], [206, 156, 84], [232, 198, 156],
     [246, 234, 206], [96, 116, 78]],
    np.float32,
) / 255  # fmt: skip


def _denoised(picture: Picture) -> Picture:
    """Bilateral filter (Tomasi & Manduchi 1998) in RGB: sensor noise and grass go, contours stay."""
    return cv2.bilateralFilter(picture, 5, 0.10, 3.0)


def _flattened(picture: Picture) -> Picture:
    """Repeated bilateral filtering (Winnemöller 2006): cartoon-like planes of colour."""
    return cv2.bilateralFilter(cv2.bilateralFilter(picture, 7, 0.14, 4.0), 7, 0.14, 4.0)


def _surround(gray: Map, sigma_cells: float = 1.6) -> Map:
    """Mean tone of the neighbourhood, measured on the 8-pixel grid, so that dim rooms still get a full drawing."""
    h, w = gray.shape
    cells = cv2.resize(gray, (-(-w // GRID), -(-h // GRID)), interpolation=cv2.INTER_AREA)
    return cv2.resize(blur(cells, sigma_cells), (w, h), interpolation=cv2.INTER_LINEAR)


def _relit(gray: Map, amount: float = 0.4) -> Map:
    """Local tone mapping (after Reinhard 2002): part of the surround's darkness is divided out, the rest is gamma.

    A large amount lets halos appear around dark shapes, which only a drawing without flat colour can afford.
    """
    return (gray ** np.float32(0.9) * (0.55 / (_surround(gray) + 0.06)) ** amount).clip(0, 1)


def _drawn_tone(gray: Map) -> Map:
    """The tone a draughtsman shades: relit, with the forms of about ten pixels pressed (unsharp masking)."""
    soft = blur(gray, 1.0)
    return (_relit(soft) + 0.8 * (soft - blur(gray, 6.0))).clip(0, 1)


def _flow(gray: Map, sigma: float = 3.0) -> tuple[Map, Map, Map]:
    """Edge tangent field and its coherence from the structure tensor of the luma (Kyprianidis & Kang 2011)."""
    gx, gy = cv2.Sobel(gray, cv2.CV_32F, 1, 0, scale=0.25), cv2.Sobel(gray, cv2.CV_32F, 0, 1, scale=0.25)
    tensor = blur(cv2.merge([gx * gx, gx * gy, gy * gy]), sigma)
    e, f, g = cv2.split(tensor)
    length, angle = cv2.cartToPolar(e - g, 2 * f)
    tx, ty = cv2.polarToCart(np.ones_like(angle), angle * 0.5 + np.float32(np.pi / 2))
    return tx, ty, length / (e + g + 1e-4)


def _combed(image: Map, tx: Map, ty: Map, reach: float = 2.0, rounds: int = 2) -> Map:
    """Short straight averages along the tangent; repeating them follows the curve at a fraction of LIC's price."""
    h, w = image.shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    steps = [(x + r * tx, y + r * ty) for r in (-reach, reach)]
    for _ in range(rounds):
        ahead = [cv2.remap(image, mx, my, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101) for mx, my in steps]
        image = 0.4 * image + 0.3 * (ahead[0] + ahead[1])
    return image


def _lines(gray: Map, sigma: float, faint: float = 0.01, firm: float = 0.045) -> Map:
    """Flow-based difference of Gaussians (Kang 2007), relative to the local tone: 0 = no line, 1 = full line."""
    tx, ty, coherence = _flow(gray)
    near, far = blur(gray, sigma), blur(gray, 1.6 * sigma)
    response = (far - near) / (far + 0.15) * smoothstep(0.0, 0.45, coherence)
    return smoothstep(faint, firm, _combed(response, tx, ty, 2.0 * max(sigma, 1.0)))


def _contrast(value: Map, low: float, high: float) -> Map:
    """A linear stretch of [low, high] to [0, 1]."""
    return ((value - low) / (high - low)).clip(0, 1)


def _vivid(picture: Picture, target: Map, saturation: float) -> Picture:
    """The picture's hues at another luma; dull colours gain `saturation`, strong ones (and skin) much less."""
    gray = luma(picture)
    chroma = picture - gray[..., None]
    strength = cv2.transform(chroma * chroma, np.ones((1, 3), np.float32)) / 0.12**2
    gain = (1.25 + (saturation - 1.25) / (1 + strength)) * np.sqrt((target + 0.15) / (gray + 0.15))
    return (target[..., None] + chroma * gain[..., None]).clip(0, 1)


def _engraved(tone: Map, pattern: Map, softness: float = 0.35) -> Map:
    """A line screen whose lines swell with the darkness `tone`: 0 = paper, 1 = ink."""
    level = 1 - 2 * tone
    return smoothstep(level - softness, level + softness, pattern) * smoothstep(0.02, 0.14, tone)


def ink(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Brush-pen drawing by flow-based XDoG (Winnemöller 2012): contour lines and solid black shadows."""
    gray = luma(_denoised(picture))
    lines = _lines(gray, 1.1 * thickness, 0.007, 0.035)
    tx, ty, _ = _flow(gray, 4.0)
    tone = _combed(_drawn_tone(gray), tx, ty, 3.0)
    shadow = 1 - smoothstep(0.275, 0.335, tone)
    return mix(np.broadcast_to(np.float32(WARM_WHITE), picture.shape), BLACK_INK, np.maximum(lines, shadow))


def toon(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Cel shading (Winnemöller 2006): abstraction, soft luminance steps, strong colours, clean outlines."""
    smooth = _flattened(picture)
    gray = luma(smooth)
    steps = quantise(blur(_relit(gray, 0.15) ** 0.95, 1.0), 4, 9.0)
    cel = _vivid(smooth, 0.06 + 0.92 * steps, 1.9)
    return mix(cel, (0.08, 0.06, 0.12), 0.92 * _lines(gray, 1.1 * thickness))


def pencil(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Graphite drawing: soft outlines, a smudged base tone and diagonal hatching that follows the tone."""
    gray = luma(_denoised(picture))
    dark = 1 - _contrast(_drawn_tone(gray), 0.10, 0.64)
    hatch = _engraved(0.75 * thickness**0.4 * dark, screen(gray.shape, 1, 1), 0.8)
    cross = _engraved(1.1 * (dark - 0.55).clip(0, 1), screen(gray.shape, 1, -1), 0.8)
    shade = 0.15 * dark + 0.30 * hatch + 0.22 * cross + 0.25 * dark * dark
    shade = np.maximum(shade, 0.85 * smoothstep(0.8, 1.0, dark))  # the deepest shadows are rubbed solid
    outline = 0.85 * _lines(gray, 1.0 * thickness, 0.006, 0.07)
    paper = np.broadcast_to(np.float32(DRAWING_PAPER), picture.shape)
    return mix(paper, GRAPHITE, 1 - (1 - shade.clip(0, 0.85)) * (1 - outline))


def _printed(picture: Picture, blocks: Picture, sharpness: float) -> Picture:
    """Soft assignment of every colour to the printing blocks (softmax over squared distances)."""
    scores = np.float32(sharpness) * (blocks @ picture.reshape(-1, 3).T - 0.5 * (blocks * blocks).sum(1)[:, None])
    weights = np.exp(scores - scores.max(0))
    print_ = (blocks.T @ weights) / weights.sum(0)
    return cv2.merge(list(print_.reshape(3, *picture.shape[:2])))


def woodcut(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Ukiyo-e print: flat planes from a few pigments, a trace of bokashi gradation, carved key-block lines."""
    smooth = _flattened(picture)
    gray = luma(smooth)
    tone = _relit(gray, 0.2)
    planes = 0.5 * tone + 0.5 * quantise(tone, 4)
    print_ = _printed(_vivid(smooth, _contrast(planes, 0.05, 0.80), 1.8), WOODBLOCKS, 60.0)
    graded = print_ * (0.88 + 0.2 * _surround(tone))[..., None]
    return mix(graded, (0.10, 0.10, 0.16), 0.9 * _lines(gray, 1.2 * thickness)).clip(0, 1)


def comic(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Comic print: bright quantised colours, black outlines, a 45-degree halftone in mid-tones and shadows."""
    smooth = _flattened(picture)
    gray = luma(smooth)
    tone = blur(_relit(gray, 0.2), 1.0) ** 0.85
    flat = _vivid(smooth, 0.25 + 0.73 * quantise(_contrast(tone, 0.1, 0.8), 3, 9.0), 2.1)
    dots = 0.5 * (screen(gray.shape, 1, 1) + screen(gray.shape, 1, -1))
    size = 0.62 * thickness**0.4 * (1 - _contrast(tone, 0.15, 0.60))
    coloured = mix(flat, 0.62 * flat * (0.35 + 0.65 * flat), 0.9 * _engraved(size, dots))
    black = np.maximum(_lines(gray, 1.15 * thickness), 1 - smoothstep(0.12, 0.22, tone))
    return mix(coloured, (0.05, 0.04, 0.08), 0.95 * black)


def neon(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Neon tubes along the contours: local hue, white-hot core, bloom, and a dim hint of the picture."""
    smooth = _denoised(picture)
    gray = luma(smooth)
    tx, ty, _ = _flow(gray)
    tube = _lines(gray, 1.1 * thickness, 0.004, 0.035)
    turn = np.stack([0.5 + 0.5 * (tx * tx - ty * ty), 0.25 + 0.5 * tx * ty, 0.6 + 0.4 * (ty * ty - tx * tx)], -1)
    hue = (blur(smooth - gray[..., None], 3.0) * 4.0 + turn * 0.9 + 0.1).clip(0.05, 1)
    glow = hue * tube[..., None]
    h, w = gray.shape
    small = cv2.resize(glow, (-(-w // 4), -(-h // 4)), interpolation=cv2.INTER_AREA)
    bloom = cv2.resize(1.0 * blur(small, 1.0) + 1.3 * blur(small, 3.0), (w, h), interpolation=cv2.INTER_LINEAR)
    night = 0.36 * smooth * np.float32([0.75, 0.65, 1.0]) + np.float32([0.01, 0.005, 0.04])
    core = 0.25 * (tube * tube)[..., None]
    return (1 - (1 - night) * (1 - (glow + core).clip(0, 1)) * np.exp(-bloom)).clip(0, 1)


def engraving(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Banknote engraving: swelling lines that bend with the form, crossed in the shadows, on cream paper."""
    gray = luma(_denoised(picture))
    dark = 1 - _contrast(_drawn_tone(gray), 0.08, 0.68)
    bend = 2.0 * blur(gray, 4.0)
    main = _engraved(0.6 * thickness**0.4 * dark, screen(gray.shape, 1, -1, bend), 0.5)
    across = _engraved(0.9 * (dark - 0.45).clip(0, 1), screen(gray.shape, 1, 1, bend), 0.5)
    solid = smoothstep(0.8, 1.0, dark)  # lines run together in the deepest shadows
    outline = np.maximum(_lines(gray, 0.9 * thickness, 0.007, 0.04), solid)
    paper = np.broadcast_to(np.float32(CREAM), picture.shape)
    return mix(paper, BURIN_INK, 1 - (1 - 0.75 * main) * (1 - 0.6 * across) * (1 - 0.9 * outline))


LINE_PAINTERS: dict[str, Painter] = {
    "ink": ink,
    "toon": toon,
    "pencil": pencil,
    "woodcut": woodcut,
    "comic": comic,
    "neon": neon,
    "engraving": engraving,
}
