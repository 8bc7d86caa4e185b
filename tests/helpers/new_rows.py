"""A small table with every kind of column, and the flags and settings to train on it."""

from __future__ import annotations

import csv
import random

from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}
FLAGS = (
    "--text", "caption", "--categorical", "colour", "--vector", "size=a,b", "--image", "photo",
    "--binary", "ok", "--image-size", 8, "--min-count", 2, "--na", "?", "--group", "owner",
)  # fmt: skip
SETTINGS = (
    "train.max_steps=30", "train.batch_size=16", "model.shared_dim=4", "model.private_dim=2",
    "model.num_clusters=6", "tracking.enabled=false", "data.num_workers=0",
    *(f"model.modalities.{name}.width=4" for name in ("caption", "colour", "size", "photo", "ok")),
)  # fmt: skip


def make_rows(count: int, folder, seed: int = 0) -> list[dict[str, object]]:
    """Rows of three kinds, which every column shows; some cells are empty."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for number in range(count):
        colour = list(COLOURS)[number % 3]
        path = folder / "photos" / f"{colour}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (9, 9), COLOURS[colour]).save(path)
        size = 100 + 20 * (number % 3)
        rows.append(
            {
                "a": "?" if number % 10 == 4 else round(size + rng.gauss(0, 1), 3),
                "b": round(size / 50 + rng.gauss(0, 0.1), 4),
                "colour": "" if number % 7 == 3 else colour,
                "caption": ""
                if number % 11 == 5
                else f"A {colour} thing, number {rng.choice(['one', 'two'])}",
                "photo": f"photos/{colour}.png",
                "ok": "" if number % 13 == 6 else ("Yes", "No", "No")[number % 3],
                "owner": f"owner {number // 3}" if number < 30 else f"single {number}",
            }
        )
    return rows


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
