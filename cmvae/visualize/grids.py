"""Grids of real and generated samples.

Functions take stored values (see `cmvae.modalities`); each modality draws its own. They do not use pyplot,
which would keep every figure alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cmvae.clustering import BoolArray
from cmvae.modalities import ImageModality, Modality
from cmvae.visualize.style import ACCENT, GRID, INK, Figure, clear_axes

# Margin around a drawn value, as a share of its cell.
_CELL_GAP = 0.02


def cross_modal_grid(
    inputs: Mapping[str, NDArray],
    generated: Mapping[tuple[str, str], NDArray],
    refined: Mapping[tuple[str, str], NDArray] | None = None,
    *,
    modalities: Mapping[str, Modality],
    present: Mapping[str, BoolArray] | None = None,
) -> Figure:
    """Grid of every modality generated from every modality: one block per target, one row per source.

    The first row shows the inputs. A column is one sample, so it shows one class from top to bottom.
    Reconstructions (source = target) are framed. Cells of missing modalities, and of what would be generated
    from them, stay white.

    Args:
        inputs: modality → (N, *shape), as stored.
        generated: (source, target) → (N, *shape), for every ordered pair.
        refined: (source, target) → (N, *shape) after refinement, drawn in a row below; only some targets.
        modalities: by name.
        present: modality → (N,) bool, the samples that have it; None means all.
    """
    names = list(inputs)
    num_samples = len(next(iter(inputs.values())))
    everything = np.ones(num_samples, dtype=bool)
    there = {name: everything if present is None else present[name] for name in names}
    rows: list[tuple[str, str | None, Mapping[str, NDArray]]] = [("input", None, inputs)]
    for source in names:
        rows.append((f"from {source}", source, {name: generated[source, name] for name in names}))
        if refined is not None:
            of_source = {name: refined[source, name] for name in names if (source, name) in refined}
            rows.append(("refined", source, of_source))
    widths, height = _cell_sizes([modalities[name] for name in names])
    figure = Figure(
        figsize=(
            0.9 + sum(num_samples * width + 0.15 for width in widths),
            0.45 + len(rows) * (height + 0.06),
        ),
    )
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.0)
    axes = figure.subplots(len(rows), len(names), squeeze=False, width_ratios=widths)
    for column, (target, width) in enumerate(zip(names, widths, strict=True)):
        axes[0, column].set_title(f"→ {target}", fontsize=10, color=INK, fontweight="bold")
        for row, (_, made_from, made) in enumerate(rows):
            ax = axes[row, column]
            clear_axes(ax)
            if target in made:
                shown = there[made_from or target]
                _show_values(ax, made[target][None], modalities[target], shown[None], (width, height))
                if made_from == target:
                    _frame(ax)
    for row, (title, _, _) in enumerate(rows):
        _title_row(axes[row, 0], title)
    return figure


def sample_rows(
    values: Mapping[str, NDArray],
    titles: Sequence[str],
    *,
    modalities: Mapping[str, Modality],
    present: Mapping[str, BoolArray] | None = None,
) -> Figure:
    """Grid of samples that belong together in rows, such as those of one cluster: one block per modality.

    Args:
        values: name of the block → (R, S, *shape), as stored; [r, s] is the same sample in every block.
        titles: R row names.
        modalities: the modality that each block shows.
        present: name of the block → (R, S) bool, False where a cell stays white; None means all True.
    """
    num_rows, num_samples = next(iter(values.values())).shape[:2]
    everything = np.ones((num_rows, num_samples), dtype=bool)
    widths, height = _cell_sizes([modalities[name] for name in values])
    figure = Figure(
        figsize=(
            1.2 + sum(num_samples * width + 0.15 for width in widths),
            0.45 + num_rows * height * 1.02,
        ),
        layout="constrained",
    )
    axes = figure.subplots(1, len(values), squeeze=False, width_ratios=widths)[0]
    for ax, width, (name, samples) in zip(axes, widths, values.items(), strict=True):
        ax.set_title(name, fontsize=10, color=INK, fontweight="bold")
        clear_axes(ax)
        shown = everything if present is None else present[name]
        _show_values(ax, samples, modalities[name], shown, (width, height))
    # Row centres, in the data units of the first block.
    bottom, top = axes[0].get_ylim()
    middles = [top + (row + 0.5) / num_rows * (bottom - top) for row in range(num_rows)]
    axes[0].set_yticks(middles, titles)
    axes[0].tick_params(axis="y", length=0, labelsize=8, labelcolor=INK)
    return figure


def _cell_sizes(modalities: Sequence[Modality]) -> tuple[list[float], float]:
    """Size of a cell in inches: one width per modality, one height for all."""
    sizes = [modality.drawn_size for modality in modalities]
    height = max(height for _, height in sizes)
    # Images scale with the height of the row; text and bars would only be stretched.
    widths = [
        width * height / own if isinstance(modality, ImageModality) else width
        for modality, (width, own) in zip(modalities, sizes, strict=True)
    ]
    return widths, height


def _show_values(
    ax: Axes, values: NDArray, modality: Modality, shown: BoolArray, cell: tuple[float, float]
) -> None:
    """Draw stored values (R, S, *shape) in rows and columns where `shown` (R, S) is True.

    Images are drawn as one array, which is fast. Any other value has an axes of its own, of size `cell`.
    """
    if isinstance(modality, ImageModality):
        ax.imshow(_tile(values, shown), interpolation="nearest")
        return
    (num_rows, num_columns), (width, height) = shown.shape, cell
    # The same extent as images of this size, so that rows of different blocks are level.
    ax.set(xlim=(0, num_columns * width), ylim=(num_rows * height, 0), aspect="equal")
    for row, column in np.argwhere(shown):
        inner = ax.inset_axes(
            (
                (column + _CELL_GAP) / num_columns,
                1 - (row + 1 - _CELL_GAP) / num_rows,
                (1 - 2 * _CELL_GAP) / num_columns,
                (1 - 2 * _CELL_GAP) / num_rows,
            )
        )
        # The layout engine takes long with hundreds of axes.
        inner.set_in_layout(False)
        inner.set(xticks=[], yticks=[])
        inner.spines[:].set(color=GRID, linewidth=0.7)
        modality.draw(inner, values[row, column])


def _tile(images: NDArray, shown: BoolArray) -> NDArray:
    """One RGB array (H', W', 3) uint8 of images (R, S, C, H, W) uint8, separated by one white pixel."""
    rows, columns, _, height, width = images.shape
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, dtype=np.uint8)
    for row, column in np.argwhere(shown):
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        # A single channel is broadcast to three.
        canvas[top : top + height, left : left + width] = images[row, column].transpose(1, 2, 0)
    return canvas


def _frame(ax: Axes) -> None:
    ax.spines[:].set(visible=True, color=ACCENT, linewidth=1.8)


def _title_row(ax: Axes, title: str) -> None:
    ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=6)
