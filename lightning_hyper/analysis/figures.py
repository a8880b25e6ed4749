"""How our pictures of curves look."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
