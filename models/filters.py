"""The few picture operations of the frame lane: OpenCV's vector code on a CPU, torch on any other device.

Pictures and fields are (1, C, H, W) float32 with at most four channels. On a CPU they travel as channels-last tensors,
so that OpenCV reads and writes them in place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import av  # noqa: F401 before OpenCV: see stream/sources/screen.py
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from accel.transfer import brought, fetched

CPU = torch.device("cpu")
HOSTS = ("cpu",)  # kinds of devices whose values can be looked at without waiting, and that OpenCV computes on
SCALE = np.full(4, 1 / 255)  # per channel: OpenCV takes four of them for a scalar
UNSCALE = np.full(4, 255.0)


def on_cpu(device: torch.device) -> bool:
    """Whether OpenCV computes there, and a value can be looked at without waiting."""
    return device.type in HOSTS


def share_cores(crowded: bool) -> None:
    """Let OpenCV spread a picture over all cores, or over half of them where a model is at work on all.

    Pieces of a picture wait for the last of them, which a busy core holds up: beside SD-Turbo at work on two cores the
    frame lane shows 28 pictures of 512×512 a second instead of 25.
    """
    cv2.setNumThreads(max(1, cv2.getNumberOfCPUs() // 2) if crowded else -1)


def to_picture(image: NDArray[np.uint8], device: torch.device = CPU) -> Tensor:
    """(H, W, 3) uint8 → (1, 3, H, W) float in [0, 1] on the device."""
    if on_cpu(device):
        return to_tensor(cv2.multiply(image, SCALE, dtype=cv2.CV_32F))
    return brought(torch.from_numpy(image), device).permute(2, 0, 1)[None] / 255


def halved(image: NDArray[np.uint8], device: torch.device = CPU) -> Tensor:
    """(H, W, 3) uint8 → (1, 3, H/2, W/2) float in [0, 1] on the device, averaged."""
    size = (image.shape[1] // 2, image.shape[0] // 2)
    if on_cpu(device):
        return to_picture(np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8))
    return resize(to_picture(image, device), size)


def to_image(picture: Tensor) -> NDArray[np.uint8]:
    """(1, 3, H, W) float in [0, 1] → (H, W, 3) uint8, rounded; waits for the device that has it."""
    if on_cpu(picture.device):
        image: NDArray[Any] = cv2.multiply(to_pixels(picture), UNSCALE, dtype=cv2.CV_8U)
        return image
    levels = (picture[0].permute(1, 2, 0) * 255).round_().clamp_(0, 255).to(torch.uint8).contiguous()
    (host,) = fetched(levels).wait()
    return host.numpy()


def chosen(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` where the condition, a single value, holds, else `other`; no device is asked which."""
    if on_cpu(condition.device):
        return one if bool(condition) else other
    return torch.where(condition, one, other)


def to_tensor(pixels: NDArray[Any]) -> Tensor:
    """(H, W) or (H, W, C) float32 → (1, C, H, W), the same memory."""
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)[None]


def to_pixels(picture: Tensor) -> NDArray[np.float32]:
    """(1, C, H, W) → (H, W, C), the same memory where the tensor is channels-last."""
    return picture[0].permute(1, 2, 0).contiguous().numpy()


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """To (width, height): averaged when smaller, every pixel counting by its area; bilinear when larger.

    PyTorch's own "area" weighs all pixels alike, which is another thing unless the ratio is whole.
    """
    width, height = size
    if picture.shape[2:] == (height, width):
        return picture
    smaller = width < picture.shape[3]
    if on_cpu(picture.device):
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        return to_tensor(cv2.resize(to_pixels(picture), size, interpolation=how))
    if not smaller or height > picture.shape[2]:
        return F.interpolate(picture, (height, width), mode="bilinear")
    down, across = picture.shape[2] / height, picture.shape[3] / width
    if down == int(down) and across == int(across):
        return F.avg_pool2d(picture, (int(down), int(across)))
    rows = area_weights(picture.shape[2], height, picture.device)
    return rows @ picture @ area_weights(picture.shape[3], width, picture.device).mT


@lru_cache(maxsize=16)
def area_weights(before: int, after: int, device: torch.device) -> Tensor:
    """How far each of `before` pixels lies in each of the `after` larger ones, (after, before); rows sum to 1."""
    ratio = before / after
    with torch.inference_mode(False):
        left = torch.arange(after, dtype=torch.float64)[:, None] * ratio
        place = torch.arange(before, dtype=torch.float64)
        covered = (torch.minimum(left + ratio, place + 1) - torch.maximum(left, place)).clamp_min(0)
        return brought((covered / ratio).float(), device)


def box(picture: Tensor, radius: int) -> Tensor:
    """Mean over (2·radius + 1)² pixels, edges repeated."""
    side = 2 * radius + 1
    if on_cpu(picture.device):
        return to_tensor(cv2.boxFilter(to_pixels(picture), -1, (side, side), borderType=cv2.BORDER_REPLICATE))
    columns = F.avg_pool2d(F.pad(picture, (0, 0, radius, radius), mode="replicate"), (side, 1), 1)
    return F.avg_pool2d(F.pad(columns, (radius, radius, 0, 0), mode="replicate"), (1, side), 1)


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian low-pass of σ pixels, edges repeated."""
    if on_cpu(picture.device):
        return to_tensor(cv2.GaussianBlur(to_pixels(picture), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE))
    kernel = _gaussian(sigma, picture.device).expand(picture.shape[1], 1, 1, -1)
    reach = kernel.shape[3] // 2
    picture = F.conv2d(F.pad(picture, (reach, reach, 0, 0), mode="replicate"), kernel, groups=len(kernel))
    return F.conv2d(F.pad(picture, (0, 0, reach, reach), mode="replicate"), kernel.mT, groups=len(kernel))


@lru_cache(maxsize=8)
def _gaussian(sigma: float, device: torch.device) -> Tensor:
    """Weights of pixels in a line that sum to 1."""
    reach = int(4 * sigma + 0.5)
    with torch.inference_mode(False):
        line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
        return brought(line / line.sum(), device)


def erode(mask: Tensor, radius: int) -> Tensor:
    """Minimum over (2·radius + 1)² pixels: what is doubtful spreads."""
    side = 2 * radius + 1
    if on_cpu(mask.device):
        return to_tensor(cv2.erode(to_pixels(mask), np.ones((side, side), np.uint8)))
    return -F.max_pool2d(-mask, side, 1, radius)


def total(picture: Tensor) -> Tensor:
    """The sum over channels, (1, 1, H, W)."""
    if on_cpu(picture.device):
        return to_tensor(cv2.transform(to_pixels(picture), np.ones((1, picture.shape[1]), np.float32)))
    return picture.sum(1, keepdim=True)


def weigh(mask: Tensor, picture: Tensor) -> Tensor:
    """A mask (1, 1, h, w), brought to the picture's size, times the picture (1, 3, H, W)."""
    mask = resize(mask, (picture.shape[3], picture.shape[2]))
    if on_cpu(picture.device):
        return to_tensor(cv2.multiply(cv2.cvtColor(to_pixels(mask), cv2.COLOR_GRAY2RGB), to_pixels(picture)))
    return mask * picture


def grey(picture: Tensor) -> Tensor:
    """Luma (BT.601), (1, 1, H, W)."""
    if on_cpu(picture.device):
        return to_tensor(cv2.cvtColor(to_pixels(picture), cv2.COLOR_RGB2GRAY))
    return 0.299 * picture[:, :1] + 0.587 * picture[:, 1:2] + 0.114 * picture[:, 2:]


def sample(field: Tensor, flow: Tensor) -> Tensor:
    """Bilinear backward warp, for flows, masks and latents: out(p) = field(p + flow(p)), edges repeated."""
    if on_cpu(field.device) and field.shape[1] <= 4:  # OpenCV knows no more channels
        return to_tensor(_remap(to_pixels(field), _places(flow), cv2.INTER_LINEAR))
    return F.grid_sample(field, _grid(flow), "bilinear", "border", False)


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """Catmull-Rom backward warp, for pictures: out(p) = picture(p + flow(p)), edges repeated.

    Both libraries' cubic kernel has A = -0.75, Catmull-Rom's is A = -0.5. The kernel is linear in A, and A = 0 is a
    bilinear look-up at a smoothed fraction; so two thirds of one and a third of the other make the kernel wanted along
    each axis (along both at once it is off by at most 1/64 of the range, on white noise).
    """
    if on_cpu(picture.device):
        places = _places(flow)
        pixels = to_pixels(picture)
        sharp = _remap(pixels, places, cv2.INTER_CUBIC)
        smooth = _remap(pixels, to_pixels(_eased(to_tensor(places))), cv2.INTER_LINEAR)
        return to_tensor(cv2.scaleAdd(cv2.subtract(sharp, smooth, dst=sharp), 2 / 3, smooth))
    own, _, _ = _places_on(*flow.shape[2:], flow.device)
    sharp_tensor = F.grid_sample(picture, _grid(flow), "bicubic", "border", False)
    smooth_tensor = F.grid_sample(picture, _grid(_eased(flow + own) - own), "bilinear", "border", False)
    return torch.lerp(sharp_tensor, smooth_tensor, 1 / 3)


def inside(flow: Tensor) -> Tensor:
    """Whether p + flow(p) lies in the picture, (1, 1, H, W) bool."""
    height, width = flow.shape[2:]
    own, _, _ = _places_on(height, width, flow.device)
    places = flow + own
    return ((places >= 0) & (places <= own[..., -1:, -1:])).all(1, keepdim=True)


@lru_cache(maxsize=8)
def _columns_rows(height: int, width: int) -> NDArray[np.float32]:
    """Every pixel's own x and y, (H, W, 2)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.ascontiguousarray(np.stack([x, y], 2))


def _places(flow: Tensor) -> NDArray[Any]:
    """Where a flow (1, 2, H, W) leads to, (H, W, 2)."""
    return cv2.add(to_pixels(flow), _columns_rows(*flow.shape[2:]))


def _eased(places: Tensor) -> Tensor:
    """Places whose fractions follow the smooth step 3t² - 2t³."""
    whole = places.floor()
    part = places - whole
    return whole.add_(part.square().mul_(part.mul_(-2).add_(3)))


def _remap(pixels: NDArray[np.float32], places: NDArray[Any], how: int) -> NDArray[Any]:
    return cv2.remap(pixels, places, None, how, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload, no-any-return]


@lru_cache(maxsize=8)
def _places_on(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel's own x and y, the same in `grid_sample`'s coordinates, and those per pixel; (1, 2, H, W) or 1, 1.

    Made once, since a device waits for what comes from the host.
    """
    with torch.inference_mode(False):
        own = torch.from_numpy(_columns_rows(height, width)).permute(2, 0, 1)[None].contiguous()
        step = torch.tensor([2 / width, 2 / height]).view(1, 2, 1, 1)
        return brought(own, device), brought((own + 0.5) * step - 1, device), brought(step, device)


def _grid(flow: Tensor) -> Tensor:
    """Where a flow (1, 2, H, W) leads to, in `grid_sample`'s coordinates."""
    _, own, step = _places_on(*flow.shape[2:], flow.device)
    return torch.addcmul(own, flow, step).permute(0, 2, 3, 1)
