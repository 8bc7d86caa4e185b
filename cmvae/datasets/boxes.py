"""The square that is cropped around the bounding box of what a photograph shows."""

from __future__ import annotations

from collections.abc import Sequence

_MARGIN = 0.1
"""Share of the longer side of a box that is added to it."""


def square_around(box: Sequence[float], frame: tuple[float, float]) -> tuple[float, float, float, float]:
    """The square around the centre of a box, with a margin, moved into the photograph.

    Args:
        box: left, top, width and height, in pixels.
        frame: width and height of the photograph, in pixels. Its shorter side bounds the square.

    Returns:
        Left, top, right and bottom, in pixels.
    """
    left, top, width, height = box
    side = min((1 + _MARGIN) * max(width, height), *frame)
    x = min(max(0.0, left + (width - side) / 2), frame[0] - side)
    y = min(max(0.0, top + (height - side) / 2), frame[1] - side)
    return x, y, x + side, y + side
