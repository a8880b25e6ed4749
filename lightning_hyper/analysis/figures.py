"""How our pictures of curves look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def over_frames(axes: Axes) -> None:
    """Give axes an x axis of environment frames, and no box."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("environment frames")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    without_box(axes)


def without_box(axes: Axes) -> None:
    """Leave two of the axes' sides, and light lines at the heights that are marked."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def short_task(task: str) -> str:
    """An id of MiniGrid as tables and pictures show it, without what nearly all have."""
    return task.removeprefix("MiniGrid-").removesuffix("-v0")


def name_lines(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the names right of the axes at the heights where the lines end, pushed apart until none overlap."""
    low, high = axes.get_ylim()
    apart = 0.055 * 4.5 / axes.figure.get_figheight()
    ordered = sorted(ends)
    places = [(height - low) / (high - low) for height, _, _ in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    overflow = max(0.0, places[-1] - 1.0) if places else 0.0
    if overflow:  # then from the top down
        places[-1] -= overflow
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - apart)
    for place, (_, label, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            label,
            (1.015, place),
            xycoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
