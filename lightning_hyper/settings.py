"""The keys of a recipe besides `model`, `data`, `trainer` and `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_type_hints

from lightning_hyper.checks import Finite, Frames, Matching, Seed, Threads

Folder = Annotated[
    str, Matching(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,200}", "a name for a folder: not empty, without / and line breaks")
]
Place = Annotated[str, Matching(r"[^\x00]+", "a path")]


@dataclass(frozen=True)
class Settings:
    """What a run is beyond its parts.

    Args:
        frames: environment frames to train for, all ranks together.
        seed: of weights, tasks, actions and minibatches.
        experiment: MLflow experiment, and folder under the root.
        root: folder under which everything lies that a run writes.
        run: name of the run; made of recipe and seed by default.
        paper: arXiv number of the paper; a tag.
        method: name of the method; a tag, by which reports group runs.
        environment: name of the environment; a tag, by which reports group runs.
        variant: what a sweep varies in this run; a tag.
        parent: MLflow id of the parent run; a sweep sets it.
        tracking_uri: MLflow server; a database under the root by default.
        weights: checkpoint whose weights training begins with.
        stop_at_return: end early at this `eval/return`.
        threads: threads of PyTorch; by default those of OMP_NUM_THREADS, which is 1 unless it is set.
        matmul: float32 matrix products on CPUs: the faster exact path, found once for a machine, or PyTorch's.
    """

    frames: Frames = 1_000_000
    seed: Seed = 0
    experiment: Folder = "default"
    root: Place = "runs"
    run: Folder | None = None
    paper: str = ""
    method: str = ""
    environment: str = ""
    variant: str = ""
    parent: str | None = None
    tracking_uri: Place | None = None
    weights: Place | None = None
    stop_at_return: Finite | None = None
    threads: Threads | None = None
    matmul: Literal["auto", "default"] = "auto"


KEYS = ("model", "data", "trainer", "checkpoint", *(field.name for field in fields(Settings)))
TYPES: dict[str, Any] = get_type_hints(Settings)
TEXTS = {name for name, hint in TYPES.items() if str in (hint, *get_args(hint))}  # never read as YAML
OPTIONAL = {name for name, hint in TYPES.items() if type(None) in get_args(hint)}
