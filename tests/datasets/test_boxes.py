import pytest

from cmvae.datasets.boxes import square_around


@pytest.mark.parametrize(
    ("box", "frame", "square"),
    [
        ((40, 30, 20, 10), (100, 80), (39, 24, 61, 46)),  # 1.1 times the longer side, around the centre
        ((0, 0, 20, 10), (100, 80), (0, 0, 22, 22)),  # moved into the photograph
        ((80, 60, 20, 20), (100, 80), (78, 58, 100, 80)),
        ((10, 0, 80, 80), (100, 80), (10, 0, 90, 80)),  # no larger than the photograph
    ],
)
def test_square_around(box, frame, square):
    assert square_around(box, frame) == pytest.approx(square)
