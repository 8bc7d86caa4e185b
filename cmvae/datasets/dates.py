"""Dates and times as numbers: seconds, and the place in the day, the week and the year as sine and cosine.

Seconds count from the beginning of 1970 in UTC, so that `numpy.datetime64(round(seconds), "s")` is the date
again. A date without a time zone is taken as UTC.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

import numpy as np

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_FIRST, _LAST = ((datetime(year, 1, 1, tzinfo=timezone.utc) - _EPOCH).total_seconds() for year in (1, 9999))
_NUMBER = re.compile(r"[-+]?\d{5,}(\.\d+)?")
_DAY, _WEEK = 86400, 7 * 86400
_THURSDAY = 3 * _DAY
"""1970 began on a Thursday; weeks begin on Mondays."""


def read_date(text: str, form: str | None = None) -> float:
    """Seconds since 1970 of a date.

    Args:
        text: the date.
        form: its form as `datetime.strptime` takes it; None reads ISO 8601, such as 2024-05-01 or
            2024-05-01T13:30:00+02:00, and seconds since 1970, such as 1714570200.

    Raises:
        ValueError: it is no date in this form, or not in the years 1 to 9998.
    """
    if form is None and _NUMBER.fullmatch(text):
        seconds = float(text)
    else:
        try:
            # Python 3.10 does not know the Z.
            iso = re.sub(r"(?<=\d)[Zz]$", "+00:00", text)
            date = datetime.fromisoformat(iso) if form is None else datetime.strptime(text, form)
        except ValueError as error:
            wanted = "in ISO 8601, such as 2024-05-01 13:30" if form is None else f"of the form {form}"
            raise ValueError(f"{text!r} is not a date {wanted}. Fix it, or give --date-format") from error
        aware = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
        seconds = (aware - _EPOCH) / timedelta(seconds=1)
    if not _FIRST <= seconds < _LAST:
        raise ValueError(f"{text!r} is not in the years 1 to 9998. Fix it; milliseconds must be seconds")
    return seconds


def date_parts(column: str, seconds: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers that describe dates.

    Args:
        column: name of the column.
        seconds: (N,) since 1970, NaN for a missing date.

    Returns:
        By name (N,) the seconds, then sine and cosine of the place in the day, the week and the year, NaN for
        a missing date.
    """
    there = ~np.isnan(seconds)
    whole = np.floor(np.where(there, seconds, 0)).astype(np.int64).astype("datetime64[s]")
    year = whole.astype("datetime64[Y]")
    begin, end = (moment.astype("datetime64[s]").astype(np.float64) for moment in (year, year + 1))
    places = {
        "day": np.mod(seconds, _DAY) / _DAY,
        "week": np.mod(seconds + _THURSDAY, _WEEK) / _WEEK,
        "year": (seconds - begin) / (end - begin),
    }
    values = {f"{column} seconds": seconds}
    for part, place in places.items():
        values |= {
            f"{column} {part} sine": np.sin(2 * np.pi * place),
            f"{column} {part} cosine": np.cos(2 * np.pi * place),
        }
    return values


def varying_parts(parts: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Names of the parts without those of the day, if all dates have the same time of day."""
    day = [name for name in parts if name.endswith((" day sine", " day cosine"))]
    values = np.stack([parts[name] for name in day])
    there = values[:, ~np.isnan(values).any(axis=0)]
    same = there.shape[1] > 0 and bool((np.ptp(there, axis=1) == 0).all())
    return tuple(name for name in parts if not (same and name in day))
