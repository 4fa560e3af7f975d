"""The slate: readable at every size, calm, never bigger than the picture."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.slate import slate
from tests.media import moving

SIZES = [(256, 144), (512, 288), (288, 512), (640, 360), (1920, 1080), (191, 127), (64, 48)]


def lit(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where letters are."""
    return image.min(axis=2) > 170


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("under", [False, True])
def test_words_are_centred_and_inside_with_room_around(size: tuple[int, int], under: bool) -> None:
    beneath = moving(320, 180, 1)[0] if under else None
    image = slate(size, "reconnecting to the camera in the hall", beneath)
    assert image.shape == (size[1], size[0], 3)
    assert image.dtype == np.uint8
    rows, columns = np.nonzero(lit(image))
    assert len(rows) > 20
    assert abs((columns.min() + columns.max()) / 2 - size[0] / 2) < 0.05 * size[0] + 2
    assert columns.min() >= 0.05 * size[0]
    assert abs((rows.min() + rows.max()) / 2 - size[1] / 2) < 0.1 * size[1] + 2


@pytest.mark.parametrize("height", [144, 288, 720, 1080])
def test_letters_are_big_enough_for_a_coded_picture(height: int) -> None:
    image = slate((height * 16 // 9, height), "H")
    rows = np.nonzero(lit(image).any(axis=1))[0]
    assert rows.max() - rows.min() + 1 >= max(8, 0.03 * height)


@pytest.mark.parametrize("words", ["", "x" * 500, "word " * 200, "a\n\nb", "préparation : 40 %", "\t \n"])
@pytest.mark.parametrize("size", [(64, 48), (512, 288)])
def test_any_words_fit(words: str, size: tuple[int, int]) -> None:
    image = slate(size, words)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert border.max() < 100


def test_the_picture_beneath_shows_through_dimly_and_without_detail() -> None:
    beneath = np.zeros((288, 512, 3), np.uint8)
    beneath[:, 256:] = (0, 255, 0)
    beneath[::2] = 0  # detail
    image = slate((512, 288), "", beneath).astype(int)
    assert image[144, 450, 1] > image[144, 60, 1] + 15
    assert image.max() < 110
    assert np.abs(np.diff(image[:, 400], axis=0)).max() <= 2


def test_progress_is_a_bar_that_grows() -> None:
    def long(progress: float) -> int:
        image = slate((512, 288), "", None, progress)
        return int(lit(image).any(axis=0).sum())

    lengths = [long(value) for value in (0.0, 0.25, 0.5, 1.0, 7.0)]
    assert lengths[0] < lengths[1] < lengths[2] < lengths[3]
    assert lengths[4] == lengths[3]
    assert not lit(slate((512, 288), "")).any()


def test_what_was_given_stays_as_it_was() -> None:
    beneath = moving(64, 48, 1)[0]
    before = beneath.copy()
    slate((64, 48), "hello", beneath, 0.5)
    slate((64, 48), "hello", None, 0.5)
    assert np.array_equal(beneath, before)
    assert not lit(slate((64, 48), "")).any()  # the gradient that is kept was not drawn upon
