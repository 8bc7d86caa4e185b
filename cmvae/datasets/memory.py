"""Data in memory as columns: arrays, lists, data frames and paths of images; None and NaN are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cmvae.datasets.columns import IMAGE_SUFFIXES, MAX_NUMBER
from cmvae.datasets.values import Kind, Values
from cmvae.modalities import check_name
from cmvae.utils.errors import UserError

_MAX_CATEGORIES = 20
"""Strings with more distinct values than this, or with several words, are text."""


def read_values(
    data: Any, kinds: Mapping[str, Kind], columns: Mapping[str, str | Sequence[str]]
) -> dict[str, Values]:
    """Modalities of data in memory.

    Args:
        data: by modality an array, a list, a series or a data frame; with `columns` one data frame.
        kinds: kinds of modalities whose values do not show it.
        columns: by modality the name of a column of the data frame, or a list of names.

    Raises:
        UserError: values have no kind, a column is missing, or the numbers of samples differ.
    """
    if columns:
        known = list(data.columns) if _is_frame(data) else list(data)
        for name, chosen in columns.items():
            for column in names_of(chosen):
                if column not in known:
                    raise UserError(f"columns[{name!r}]: no column {column!r}; there are {known}")
        parts = {
            name: data[chosen if isinstance(chosen, str) else list(chosen)]
            for name, chosen in columns.items()
        }
    else:
        parts = dict(data)
    for name in parts:
        try:
            check_name(name)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
    if not parts:
        raise UserError("there is no modality. Give a dict with at least one")
    values = {name: _read(name, part, kinds.get(name)) for name, part in parts.items()}
    lengths = {name: len(part) for name, part in values.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"modalities have different numbers of samples: {lengths}")
    return values


def names_of(chosen: str | Sequence[str]) -> list[str]:
    """The names in an entry of `columns`, one or several."""
    return [chosen] if isinstance(chosen, str) else list(chosen)


def _is_frame(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "__getitem__") and not isinstance(data, Mapping)


def _read(name: str, data: Any, kind: Kind | None) -> Values:
    if kind is not None and kind not in get_args(Kind):
        raise UserError(f"kinds[{name!r}]: {kind!r} is none of {', '.join(get_args(Kind))}")
    if _is_frame(data):
        names = tuple(map(str, data.columns))
        parts = [data[column] for column in data.columns]
        array = np.column_stack([_numbers(name, part) for part in parts])
        return _check_binary(name, Values(kind or _kind_of_numbers(parts), array, names))
    if hasattr(data, "toarray"):
        raise UserError(f"{name}: sparse matrices are not supported. Give data.toarray()")
    if hasattr(data, "to_numpy"):
        data = data.to_numpy()
    if isinstance(data, (str, bytes)) or not hasattr(data, "__len__"):
        raise UserError(f"{name}: {type(data).__name__} holds no samples. Give an array or a list")
    form = kind or _kind_of_values(data)
    if form in ("text", "categorical"):
        return _read_strings(name, list(data), kind)
    if form == "image":
        return Values("image", [_read_image(image) for image in data])
    array = _numbers(name, data)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise UserError(
            f"{name}: an array of shape {array.shape} has no kind. A vector is (samples, dimensions); images "
            f"are uint8, or say kinds={{{name!r}: 'image'}}"
        )
    return _check_binary(name, Values(kind or _kind_of_numbers([data]), array))


def _read_image(image: Any) -> Any:
    if _is_missing(image):
        return None
    return Path(image) if isinstance(image, str) else image


def _check_binary(name: str, values: Values) -> Values:
    data = np.asarray(values.data) if values.kind == "binary" else np.zeros(0)
    if not ((data == 0) | (data == 1) | np.isnan(data)).all():
        raise UserError(f"{name}: binary values must be 0 or 1, True or False")
    return values


def _is_missing(value: Any) -> bool:
    # pandas has markers of its own, which compare with nothing.
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _kind_of_values(data: Any) -> Literal["image", "text"] | None:
    """Whether values are images or strings, which may be categories; None if they are neither."""
    if isinstance(data, np.ndarray) and data.dtype.kind not in "OU":
        return "image" if data.ndim in (3, 4) else None
    given = [value for value in data if not _is_missing(value)]
    if not given:
        return None
    if all(map(_names_image, given)) or all(getattr(value, "ndim", 0) >= 2 for value in given):
        return "image"
    return "text" if all(isinstance(value, str) for value in given) else None


def _names_image(value: Any) -> bool:
    return isinstance(value, (str, Path)) and Path(value).suffix.lower() in IMAGE_SUFFIXES


def _read_strings(name: str, data: list[Any], kind: Kind | None) -> Values:
    cells: list[str | None] = []
    for row, value in enumerate(data):
        missing = _is_missing(value) or value == ""
        if not missing and not isinstance(value, (str, int, np.integer)):
            raise UserError(f"{name}: sample {row}: {value!r} is not text. Give str or None")
        cells.append(None if missing else str(value))
    given = {cell for cell in cells if cell is not None}
    if kind is None:
        few = len(given) <= _MAX_CATEGORIES and not any(" " in cell.strip() for cell in given)
        kind = "categorical" if few else "text"
    return Values(kind, cells)


def _numbers(name: str, data: Any) -> np.ndarray:
    try:
        array = np.asarray(data)
        if np.iscomplexobj(array):
            raise UserError(f"{name}: complex data is not supported. Give real numbers")
        if array.dtype == object:
            filled = [np.nan if _is_missing(value) else value for value in array.ravel()]
            array = np.array(filled, dtype=np.float64).reshape(array.shape)
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: not all values are numbers: {error}") from error
    if (np.abs(array) > MAX_NUMBER).any():
        raise UserError(
            f"{name}: holds {array[np.abs(array) > MAX_NUMBER][0]}, which is out of the range of single "
            "precision. Replace it, or set it to NaN: missing"
        )
    return array


def _kind_of_numbers(parts: Sequence[Any]) -> Kind:
    is_bool = all(str(getattr(part, "dtype", "")) in ("bool", "boolean") for part in parts)
    return "binary" if is_bool else "vector"
