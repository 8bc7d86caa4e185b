"""What one group of metrics comes to."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.figure import Figure

REFINED = "refined/"
"""Before the name of a metric: of what a refiner made of the same generations."""


@dataclass
class GroupResult:
    """Metrics, pictures, texts, and how they were computed; the same on every rank."""

    metrics: dict[str, float] = field(default_factory=dict)
    """By name, finite."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """By file name without ending."""
    protocol: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """Parameters, seeds and sample counts, by dotted name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Names of metrics, or their common prefix, to the reason why they were left out."""
    texts: dict[str, str] = field(default_factory=dict)
    """What is to be read beside the pictures, by file name without ending."""

    def add(self, other: GroupResult) -> None:
        """Take in the results of another group."""
        self.metrics |= other.metrics
        self.figures |= other.figures
        self.texts |= other.texts
        self.protocol |= other.protocol
        self.left_out |= other.left_out
