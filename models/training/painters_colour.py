"""Procedural painters of the colour-medium family: oil, watercolour, pointillism, glass, pastel, impressionist.

Each painter is local and deterministic. Its textures repeat with the 8-pixel grid and are bent by the picture alone,
so that a crop aligned to the grid is painted as it is in the whole, and a painted video does not crawl.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from models.training.brushwork import GRID, Map, Picture, blur, luma, mix, quantise, smoothstep

Painter = Callable[..., Picture]

WARM = np.array([1.0, 0.35, -0.9], np.float32)  # toward orange; its negative is the complementary blue
STAIN_DARK = np.array([0.06, 0.12, 0.42], np.float32)
STAIN_MIDDLE = np.array([0.36, 0.50, 0.70], np.float32)
STAIN_LIGHT = np.array([1.0, 0.86, 0.52], np.float32)
BOLD = 1.3  # thickness from which two large dots fill a grid cell instead of four
WATERCOLOUR_PAPER = (0.985, 0.975, 0.95)
CHALK_PAPER = (0.80, 0.72, 0.63)
CANVAS = (0.93, 0.88, 0.78)
LEAD = (0.045, 0.04, 0.05)

_cell_y, _cell_x = np.mgrid[0:GRID, 0:GRID].astype(np.float32) * (2 * np.pi / GRID)
# Grid cells of bumps three to four pixels apart (bristles) and six to eight (brush strokes): sums of whole-period
# waves at many slants, so that they tile without a seam and smear into ridges along any direction.
BRISTLES = (
    np.cos(2 * _cell_x + _cell_y + 0.4)
    + np.cos(_cell_x - 2 * _cell_y + 1.9)
    + np.cos(2 * _cell_x - 2 * _cell_y + 3.1)
    + np.cos(_cell_x + 2 * _cell_y + 5.0)
) / 2
STROKES = (
    0.6 * np.cos(_cell_x + 0.4)
    + 0.6 * np.cos(_cell_y + 1.9)
    + 0.6 * np.cos(2 * _cell_x + 2.6)
    + 0.6 * np.cos(2 * _cell_y + 4.4)
    + np.cos(_cell_x + _cell_y + 3.1)
    + np.cos(_cell_x - _cell_y + 5.0)
    + 0.6 * np.cos(2 * _cell_x + _cell_y + 0.9)
    + 0.6 * np.cos(_cell_x - 2 * _cell_y + 2.2)
) / 2


def tiled(cell: Map, shape: tuple[int, ...]) -> Map:
    """Repeat one grid cell over a picture of this shape, anchored at its first pixel."""
    h, w = shape[:2]
    return np.tile(cell, (-(-h // GRID), -(-w // GRID)))[:h, :w].astype(np.float32)


def pixel_grid(shape: tuple[int, ...]) -> tuple[Map, Map]:
    """The x and y coordinates of every pixel."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    return x, y


def bent(cell: Map, guide: Map, reach: float) -> Map:
    """A grid texture displaced by a smooth map, so that its lattice follows the content instead of showing."""
    x, y = pixel_grid(guide.shape)
    texture = tiled(cell, guide.shape)
    return cv2.remap(texture, x + reach * guide, y - reach * guide, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def flow(picture: Picture, sigma: float, rest: float = 2e-5) -> tuple[Map, Map]:
    """Unit tangent field of the half-size structure tensor, leaning on a wide scale and a fixed slant where flat."""
    h, w = picture.shape[:2]
    sigma = min(sigma, 7.0)  # keeps the reach of the wide scale under 48 pixels
    small = blur(cv2.resize(luma(picture), ((w + 1) // 2, (h + 1) // 2), interpolation=cv2.INTER_AREA), 0.8)
    gx, gy = cv2.Sobel(small, cv2.CV_32F, 1, 0) / 8, cv2.Sobel(small, cv2.CV_32F, 0, 1) / 8
    tensor = cv2.merge((gx * gx - gy * gy, 2 * gx * gy))
    # the fixed slant keeps flat walls from following the sensor noise
    tensor = blur(tensor, sigma / 2) + 0.5 * blur(tensor, sigma * 0.75) + np.array([0, rest], np.float32)
    tensor = cv2.resize(tensor, (w, h), interpolation=cv2.INTER_LINEAR)
    cosine = tensor[..., 0] / (np.sqrt((tensor * tensor).sum(-1)) + 1e-9)
    tx = np.sqrt(np.clip((1 - cosine) / 2, 0, 1))
    ty = -np.sqrt(np.clip((1 + cosine) / 2, 0, 1)) * np.where(tensor[..., 1] < 0, -1, 1)
    return tx, ty.astype(np.float32)


def smear(image: Picture | Map, tx: Map, ty: Map, reaches: tuple[float, ...]) -> Picture | Map:
    """Line integral convolution by passes of three taps at growing reach, which follow curves at low cost."""
    x, y = pixel_grid(tx.shape)
    for reach in reaches:
        ahead = cv2.remap(image, x + reach * tx, y + reach * ty, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        behind = cv2.remap(image, x - reach * tx, y - reach * ty, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        image = (image + ahead + behind) * np.float32(1 / 3)
    return image


def kuwahara(picture: Picture, radius: float) -> Picture:
    """Generalised Kuwahara filter (Papari 2007) with eight Gaussian sectors, weighted by inverse variance."""
    reach = max(2, round(radius))
    light = luma(picture)
    stack = np.dstack((picture, light, light * light))
    stack = blur(stack, 0.55 * radius)
    stack[..., 4] -= stack[..., 3] ** 2
    weight = 1 / (1e-4 + np.maximum(stack[..., 4], 0)) ** 2
    weighted = np.dstack((stack[..., :3] * weight[..., None], weight))
    padded = cv2.copyMakeBorder(weighted, reach, reach, reach, reach, cv2.BORDER_REFLECT_101)
    h, w = light.shape
    diagonal = round(0.71 * reach)
    total = weighted * np.float32(0.2)
    for dx, dy in ((reach, 0), (diagonal, diagonal), (0, reach), (-diagonal, diagonal)):
        for sx, sy in ((dx, dy), (-dx, -dy)):
            total += padded[reach + sy : reach + sy + h, reach + sx : reach + sx + w]
    return total[..., :3] / total[..., 3:]


def crispen(picture: Picture, sigma: float, gain: float) -> Picture:
    """Unsharp masking, which gives a smoothed picture its stroke edges back."""
    return picture + gain * (picture - blur(picture, sigma))


def keep_detail(painted: Picture, picture: Picture, gain: float) -> Picture:
    """Give back the strong small darks of the picture, such as eyes and lips, that smoothing took away."""
    lost = luma(blur(picture, 0.9) - painted)
    return painted + (gain * lost * smoothstep(0.02, 0.12, np.abs(lost)))[..., None]


def calm(picture: Picture) -> Map:
    """Weight that halves an effect on warm colours such as skin, where ridges and lines would read as dirt."""
    return 1 - 0.5 * smoothstep(0.06, 0.25, picture[..., 0] - picture[..., 2])


def vivid(picture: Picture, gain: float) -> Picture:
    """Scale the distance from grey, less for bright and for warm colours, so that nothing clips and skin stays skin."""
    grey = luma(picture)[..., None]
    chroma = picture - grey
    size = np.sqrt((chroma * chroma).sum(-1, keepdims=True))
    return grey + chroma * (1 + (gain - 1) * calm(picture)[..., None] / (1 + 2.5 * size))


def relief(height: Map) -> Map:
    """Light a height map from the upper left, as raking light shows impasto."""
    kernel = np.array([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]], np.float32) / -4
    return cv2.filter2D(height, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def busy(light: Map) -> Map:
    """0.4 on flat walls and skies to 1 where there is something to model: strokes rest where nothing happens."""
    return 0.4 + 0.6 * smoothstep(0.0, 0.04, blur(np.abs(light - blur(light, 4.0)), 7.0))


def finish(picture: Picture) -> Picture:
    """Clip to the range of a picture."""
    return np.clip(picture, 0, 1).astype(np.float32)


def oil(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Oil painting: Kuwahara patches smeared along the flow (after Kyprianidis 2011) with embossed brush ridges."""
    tx, ty = flow(picture, 5 * thickness)
    body = smear(kuwahara(picture, 3.2 * thickness), tx, ty, (1.5 * thickness, 3.5 * thickness))
    body = keep_detail(crispen(body, 2.0, 0.8), picture, 0.75)
    body = vivid(body, 1.45) * np.array([1.05, 1.0, 0.92], np.float32)
    body = body + 0.2 * (body - 0.33) * (1 - body)
    light = luma(body)
    cell = 0.6 * BRISTLES + 0.5 * STROKES
    ridges = smear(bent(cell, blur(light, 2.0), 5), tx, ty, (1.2, 2.0, 3.0 * thickness))
    shade = np.tanh(1.8 * relief(0.6 * thickness * ridges + 1.2 * light))
    gloss = 0.17 * shade * (0.35 + 0.65 * light) * calm(picture) * busy(light)
    return finish(body * (1 + 0.04 * ridges[..., None]) + gloss[..., None])


def watercolour(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Watercolour by pigment density (Bousseau 2006): wet edges, granulation and bare paper in the highlights."""
    wash = kuwahara(picture, 3.2 * thickness)
    wash = keep_detail(crispen(wash, 1.2, 0.5), picture, 0.6).clip(0, 1)
    light = luma(wash)
    wash = vivid(0.13 + 0.87 * wash ** np.float32(0.74), 2.0).clip(0.02, 1)
    wash = mix(wash, WATERCOLOUR_PAPER, 0.9 * smoothstep(0.6, 1.0, light))
    # pigment gathers just inside the rim of a wash: the dark side of an edge
    rim = np.tanh(9 * np.maximum(blur(light, 2.6 * thickness) - light, 0))
    bloom = np.tanh(5 * (blur(light, 8) - blur(light, 3)))
    grain = bent(BRISTLES, blur(light, 3.0), 6)
    density = 1 + 1.4 * rim + 0.4 * bloom + 0.07 * grain * (1.1 - light)
    return finish(wash - (wash - wash * wash) * (density - 1)[..., None])


def dot_lattice(thickness: float) -> tuple[tuple[tuple[int, int], float], ...]:
    """Centre and radius of the dots in one grid cell: large ones staggered, small ones in their gaps unless bold."""
    large = ((2, 2), (6, 6))
    if thickness > BOLD:
        return tuple((centre, 2.9) for centre in large)
    radius = 2.65 if thickness > 0.8 else 2.2
    return *((centre, radius) for centre in large), *((centre, 0.66 * radius) for centre in ((6, 2), (2, 6)))


def dot_cover(centre: tuple[int, int], radius: float, shape: tuple[int, ...]) -> Map:
    """Soft-edged round dots at one place of every grid cell."""
    half = GRID // 2
    y, x = np.mgrid[0:GRID, 0:GRID].astype(np.float32)
    dx = (x - centre[0] + half) % GRID - half
    dy = (y - centre[1] + half) % GRID - half
    return tiled(smoothstep(radius + 0.7, radius - 0.7, np.hypot(dx, dy)), shape)


def dot_colour(picture: Picture, centre: tuple[int, int]) -> Picture:
    """Each pixel takes the colour at its nearest dot centre of this place in the cell."""
    h, w = picture.shape[:2]
    half = GRID // 2
    columns = ((np.arange(w) - centre[0] + half) // GRID * GRID + centre[0]).clip(0, w - 1)
    rows = ((np.arange(h) - centre[1] + half) // GRID * GRID + centre[1]).clip(0, h - 1)
    return picture[rows][:, columns]


def pointillism(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Seurat's divided colour: soft dots on the grid, split into warm, cool, light and deep touches."""
    source = vivid(crispen(blur(picture, 1.4), 3.0, 0.7), 1.9)
    light = luma(source)
    split = (0.09 * (1 - 0.5 * np.abs(2 * light - 1)))[..., None]
    # large warm dots and small cool ones stand as on a chessboard: other arrangements of four show as stripes
    tones = (0.8, -0.8) if thickness > BOLD else (1.0, 1.0, -1.3, -1.3)
    painted = mix(source, CANVAS, np.full_like(light, 0.5))
    for (centre, radius), tone in zip(dot_lattice(thickness), tones, strict=True):
        colour = dot_colour(source + tone * WARM * split, centre)
        painted = mix(painted, colour, dot_cover(centre, radius, light.shape))
    return finish(painted)


def stain(picture: Picture, light: Map) -> Picture:
    """Push colours to the strength of glass and tint the greys cobalt in the shade and amber in the light."""
    shade, shine = smoothstep(0.0, 0.6, light)[..., None], smoothstep(0.45, 0.95, light)[..., None]
    tint = STAIN_DARK + (STAIN_MIDDLE - STAIN_DARK) * shade
    tint = tint + (STAIN_LIGHT - tint) * shine
    chroma = picture - luma(picture)[..., None]
    size = np.sqrt((chroma * chroma).sum(-1, keepdims=True))
    dull = 0.6 * (1 - smoothstep(0.03, 0.16, size))
    strength = (2.2 + 2.3 * calm(picture)[..., None]) / (1 + 4.5 * size)
    return light[..., None] * (1 - dull) + tint * dull + chroma * strength


def lead_lines(panes: Picture, thickness: float) -> Map:
    """Lead along the borders of the panes, 1 = lead."""
    soft = blur(panes, 1.0)
    gx, gy = cv2.Sobel(soft, cv2.CV_32F, 1, 0) / 8, cv2.Sobel(soft, cv2.CV_32F, 0, 1) / 8
    border = (0.3 + 0.7 * thickness) * blur(np.sqrt((gx * gx + gy * gy).sum(-1)), 1.1 * thickness)
    crowd = blur(border, 7.0)  # busy places get thinner lead, else it closes up
    return smoothstep(0.015, 0.05, border * (0.3 + 0.7 * calm(panes)) / (0.5 + 24 * crowd))


def glass(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Stained glass: strongly abstracted, soft-quantised luminous colours between thick lead lines."""
    panes = keep_detail(kuwahara(kuwahara(picture, 3.0), 4.0), picture, 0.9).clip(0, 1)
    light = quantise(luma(panes), 6, 8.0)
    gray = luma(picture)
    # thin darks such as eyes and lips are drawn in lead, thin lights such as teeth are kept clear of it
    feature = blur(gray, 4.0) - blur(gray, 1.0)
    lead = lead_lines(panes, thickness) * smoothstep(-0.1, 0.0, feature)
    lead = np.maximum(lead, 0.55 * smoothstep(0.05, 0.2, feature))
    colour = stain(panes, 0.08 + 0.9 * light)
    glow = 0.66 + 0.48 * blur(1 - lead, 5.0)
    return finish(mix(colour * glow[..., None], LEAD, lead))


def pastel(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Chalk pastel: soft strokes along the flow whose grain lets the tinted paper through."""
    tx, ty = flow(picture, 4 * thickness)
    chalk = smear(kuwahara(picture, 2.4 * thickness), tx, ty, (1.5 * thickness, 3 * thickness))
    chalk = keep_detail(crispen(chalk, 3.0, 0.5), picture, 0.6).clip(0, 1)
    light = luma(chalk)
    chalk = 0.10 + 0.90 * vivid(chalk, 2.0).clip(0, 1) ** np.float32(0.88)
    tooth = bent(BRISTLES, blur(light, 2.5), 6)
    tooth = 0.25 * tooth + 1.1 * smear(tooth, tx, ty, (1.2, 2.2 * thickness))
    bare = smoothstep(-0.35, 1.0, tooth) * (0.52 - 0.08 * light) * calm(picture)
    bloom = 0.08 * smoothstep(0.1, -0.9, tooth) * light
    return finish(mix(chalk, CHALK_PAPER, bare) + bloom[..., None])


def impressionist(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """Impressionist strokes: colour divided into warm and cool, then smeared far along the flow, with relief."""
    tx, ty = flow(picture, 7 * thickness)
    base = vivid(crispen(blur(picture, 1.2), 4.0, 0.5), 2.1)
    light = luma(base)
    streaks = bent(0.75 * STROKES + 0.5 * BRISTLES, blur(light, 3.0), 5)
    streaks = smear(streaks, tx, ty, (1.3, 2.5, 4.0))
    body = crispen(smear(base, tx, ty, (1.5 * thickness, 3 * thickness, 6 * thickness)), 2.5, 0.7)
    body = keep_detail(body, picture, 0.6)
    quiet = calm(picture) ** np.float32(1.5) * busy(light)
    split = (np.tanh(2.2 * streaks) * (1.1 - 0.4 * light) * quiet)[..., None]
    body = body + WARM * (0.12 * (0.6 + 0.4 * thickness) * split) + 0.025 * split
    body = body + np.array([-0.04, 0.0, 0.10], np.float32) * smoothstep(0.55, 0.1, light)[..., None]
    return finish(body + (0.11 * np.tanh(1.5 * relief(0.7 * streaks + light)) * quiet)[..., None])


COLOUR_PAINTERS: dict[str, Painter] = {
    "oil": oil,
    "watercolour": watercolour,
    "pointillism": pointillism,
    "glass": glass,
    "pastel": pastel,
    "impressionist": impressionist,
}
