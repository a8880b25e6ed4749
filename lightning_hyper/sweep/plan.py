"""What a sweep has to run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hyper.folder import Root, RunFolder
from lightning_hyper.recipes import override, short, stem


class SweepError(ValueError):
    """A sweep that cannot start; the message is one sentence that names the option at fault."""


@dataclass
class Job:
    """One run: a recipe with the varied values and a seed.

    Args:
        recipe: its name.
        folder: where it writes.
        budget: frames; None where the recipe leaves them to `fit`.
        arguments: of the command, from `fit` on.

    Attributes:
        begins: where this attempt begins in the log, bytes.
        fault: why it failed; '' if it did not.
    """

    recipe: str
    folder: RunFolder
    budget: int | None
    arguments: list[str]
    begins: int = 0
    fault: str = ""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    def finished(self) -> bool:
        """Whether it was trained to its end, for at least today's budget of frames."""
        summary = self.folder.summary()
        try:
            # A run that ended early on purpose, at a wanted return, has spent fewer frames than its budget.
            reached = max(int(summary["frames"]), int(summary.get("budget") or 0)) if summary else -1
        except (ValueError, TypeError, KeyError):
            return False
        return reached >= (self.budget or 0)

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of this attempt's log that are not blank."""
        log = self.folder.log
        try:
            with log.open("rb") as file:
                file.seek(max(self.begins, log.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]

    def progress(self) -> str:
        """Return the newest progress line of this attempt, or else its newest line."""
        lines = self.last_lines(40)
        said = [line for line in lines if line.startswith("frames ")]
        return (said or lines or ["starting"])[-1].strip()


def plan(
    recipes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    experiment: str,
    root: Path,
    vary: Mapping[str, Sequence[str]],
    overrides: Sequence[str],
) -> list[Job]:
    """Return the jobs, seed after seed, so that all methods advance together.

    Raises:
        SweepError: no seeds, an option that is the sweep's own, or two runs of one name.
        RecipeError: something varied or overridden is no key of a recipe.
    """
    if not seeds:
        raise SweepError("--seeds must name at least one seed")
    _refuse_own_options(overrides)
    combinations = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    jobs: dict[str, Job] = {}
    for seed, (recipe, content), varied in itertools.product(seeds, recipes.items(), combinations):
        changed = _variant(varied)
        variant = ", ".join(filter(None, [str(content.get("variant") or ""), changed]))
        slug = re.sub(r"[^\w.=+-]+", "-", changed).strip("-")
        name = f"{short('-'.join(filter(None, [stem([recipe]), slug])))}-seed{seed}"
        if name in jobs:
            both = f"{jobs[name].recipe} and {recipe}" if jobs[name].recipe != recipe else f"two variants of {recipe}"
            raise SweepError(f"-c/--vary: {both} would share the run name {name}; sweep them in two experiments")
        options = [*(f"--{key}={value}" for key, value in varied.items()), *overrides]
        budget = override(content, options).get("frames")
        if budget is not None and not isinstance(budget, int):
            raise SweepError(f"frames: must be a number of environment frames, not {budget!r}")
        arguments = ["fit", "-c", recipe, "--seed", str(seed), "--experiment", experiment, "--root", str(root)]
        arguments += ["--run", name, *(["--variant", variant] if changed else []), *options]
        jobs[name] = Job(recipe, Root(root).run(experiment, name), budget, arguments)
    return list(jobs.values())


def _variant(varied: Mapping[str, str]) -> str:
    """Return what is varied, by the last part of each key, or by whole keys where two end alike."""
    last = {key: key.rsplit(".", 1)[-1] for key in varied}
    alike = len(set(last.values())) < len(last)
    return ", ".join(f"{key if alike else last[key]}={value}" for key, value in varied.items())


def _refuse_own_options(overrides: Sequence[str]) -> None:
    own = {"-c", "--config", "--seed", "--run", "--experiment", "--root", "--parent", "--tracking_uri", "--ckpt_path"}
    for option in overrides:
        if option.split("=")[0] in own:
            raise SweepError(f"{option.split('=')[0]} is set by the sweep and cannot be passed on after --")
