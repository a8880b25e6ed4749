"""A report of an MLflow experiment: for each environment one table and one picture of learning curves."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_hyper.analysis.figures import name_lines, over_frames
from lightning_hyper.analysis.runs import Array, Run, training_runs
from lightning_hyper.analysis.statistics import (
    FEWEST,
    FEWEST_TESTED,
    area_under_curve,
    bootstrap_interval,
    holm,
    interquartile_mean,
    welch,
)
from lightning_hyper.folder import Root
from lightning_hyper.tracking import close_abandoned, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Environment", "Report", "ReportError", "Series", "report"]

NOTE = 5_000  # characters that MLflow keeps of a description, servers of every age
POINTS = 200  # of a drawn curve; more cannot be seen
# Okabe and Ito's colours without their yellow: told apart by colour-blind eyes, and on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
DASHES = ("-", "--", ":", "-.")


class ReportError(ValueError):
    """A report that cannot be made; the message is one sentence that names the option at fault."""


@dataclass
class Series:
    """A method, or a variant of it, in one environment: its runs, one for each seed."""

    label: str
    runs: list[Run]

    @property
    def final(self) -> Array:
        """Last value of each seed `[seeds]`."""
        return np.array([run.values[-1] for run in self.runs])

    @property
    def area(self) -> Array:
        """Mean height of each seed's curve `[seeds]`, over the frames that it spans."""
        return np.array([area_under_curve(run.frames, run.values) for run in self.runs])

    def curves(self) -> tuple[Array, Array]:
        """Frames `[points]` that all runs span, up to the shortest one's end, and their values `[seeds, points]`."""
        begin = max(run.frames[0] for run in self.runs)
        end = min(run.frames[-1] for run in self.runs)
        grid = np.unique(np.concatenate([run.frames for run in self.runs]))
        grid = grid[(grid >= begin) & (grid <= end)]
        if len(grid) == 0:  # the runs do not overlap
            grid = np.array([end])
        if len(grid) > POINTS:
            grid = grid[np.linspace(0, len(grid) - 1, POINTS).round().astype(int)]
        return grid, np.stack([np.interp(grid, run.frames, run.values) for run in self.runs])


@dataclass
class Environment:
    """One environment of a report: its methods, the best first, its table and its files."""

    name: str
    series: list[Series]
    header: list[str]
    rows: list[list[str]]
    picture: Path


@dataclass
class Report:
    """What was made: `text` for a terminal, `markdown`, notes on what was left out, and where it lies."""

    experiment: str
    metric: str
    folder: Path
    against: str | None = None
    environments: list[Environment] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    run_id: str = ""

    @property
    def text(self) -> str:
        """The tables and notes as aligned plain text."""
        parts = [f"{env.name}: {self.metric}\n{_aligned([env.header, *env.rows])}" for env in self.environments]
        return "\n\n".join([*parts, "\n".join([*self.notes, self.legend, f"written to {self.folder}"])])

    @property
    def markdown(self) -> str:
        """The tables, pictures and notes as Markdown."""
        parts = [f"# {self.experiment}: {self.metric}"]
        for env in self.environments:
            parts += [f"## {env.name}", _markdown(env), f"![{env.name}]({env.picture.name})"]
        return "\n\n".join([*parts, *(f"- {note}" for note in self.notes), self.legend]) + "\n"

    @property
    def description(self) -> str:
        """What MLflow shows of the report's run: the tables, where they are short enough for it."""
        told = f"Report of {self.metric} in the experiment {self.experiment}. Curves and data are among the artifacts."
        tables = "\n\n".join(f"**{env.name}**\n\n{_markdown(env)}" for env in self.environments)
        whole = f"{told}\n\n{tables}\n\n{self.legend}"
        return whole if len(whole) <= NOTE else f"{told} So are the tables, in report.md."

    @property
    def legend(self) -> str:
        """What the figures are."""
        legend = (
            "Interquartile mean of n seeds, with its [95 % bootstrap interval], which of 5 holds the truth nine times "
            f"of ten; of fewer than {FEWEST} seeds (the least to the largest) instead, which of 3 holds it "
            "three times of four. Columns of episodes and tasks are means over seeds; area: mean height of the "
            "learning curve"
        )
        if self.against is None:
            return f"{legend}."
        return (
            f"{legend}; difference: of mean final values, to {self.against}, with its [95 % interval by Welch's t "
            "test]; p: of that test after Holm's correction for the table, so that a difference is decided below 0.05. "
            f"With fewer than {FEWEST_TESTED} seeds of either there is no test, and (the least to the largest "
            "difference of two seeds) instead; with fewer than 5, methods that either solve a task or do not are told "
            "apart too often."
        )


def report(
    experiment: str,
    root: str | Path = "runs",
    *,
    tracking_uri: str | None = None,
    metric: str = "eval/return",
    out: str | Path | None = None,
    references: Mapping[str, float] | None = None,
    against: str | None = None,
    unfinished: bool = False,
) -> Report:
    """Make tables and learning curves from an experiment's runs, write them to a folder and log them to MLflow.

    Runs are grouped by their tags environment, method, variant and seed, of which the newest counts.

    Args:
        experiment: name of the MLflow experiment.
        root: folder of the runs.
        tracking_uri: MLflow server; the database under `root` by default.
        metric: what is compared.
        out: folder that is written to; `<root>/<experiment>/report` by default.
        references: horizontal lines by label, in units of the metric.
        against: method to which the others' differences are given.
        unfinished: count runs too that have not finished.

    Raises:
        ReportError: there is nothing to report, or it cannot be read or written.
    """
    from mlflow.exceptions import MlflowException

    folder = Root(Path(root).absolute())
    if tracking_uri is None and not folder.database.is_file():
        raise ReportError(
            f"--root: {folder.database} does not exist; train first, or give the --root or --tracking-uri"
        )
    made = Report(experiment, metric, Path(out) if out is not None else folder.run(experiment, "report").path, against)
    try:
        client = connect(folder.path, tracking_uri)
        experiment_id = _experiment_id(client, experiment)
        close_abandoned(client, folder.path, experiment_id)
        runs, made.notes = training_runs(client, experiment_id, metric, unfinished=unfinished)
        if not runs:
            why = " ".join(made.notes) or "It has no training runs."
            raise ReportError(f"--experiment {experiment}: no finished run has the metric {metric!r}. {why}")
        labels = sorted({run.label for run in runs})
        if against is not None and against not in labels:
            raise ReportError(f"--against: no run has the method {against!r}; there are {', '.join(labels)}")
        try:
            files = _write(made, runs, references or {})
        except OSError as error:
            raise ReportError(f"--out: cannot write to {made.folder} ({error.strerror})") from error
        made.run_id = _log(client, experiment_id, files, made.description)
    except MlflowException as error:
        raise ReportError(f"MLflow: {str(error).splitlines()[0]}") from error
    return made


# --- reading ---------------------------------------------------------------------------------------------------------


def _experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        known = sorted(experiment.name for experiment in client.search_experiments())
        raise ReportError(f"--experiment: there is no experiment {name!r}; there are {', '.join(known) or 'none'}")
    return str(found.experiment_id)


# --- tables ----------------------------------------------------------------------------------------------------------


def _environment(name: str, runs: Sequence[Run], folder: Path, against: str | None) -> Environment:
    grouped: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (len(run.seed), run.seed)):
        grouped.setdefault(run.label, []).append(run)
    series = [Series(label, members) for label, members in sorted(grouped.items())]
    series.sort(key=lambda one: -np.nan_to_num(interquartile_mean(one.final), nan=-np.inf))
    parts = sorted({part for run in runs for part in run.parts}, key=_by_number)
    baseline = next((one for one in series if one.label == against), None)
    compared = ["difference", "p"] if against is not None else []
    differences = _differences(series, baseline)
    header = ["method", "frames", "final", *compared, *parts, "area", "frames/s"]
    rows = []
    for one in series:
        shortest, longest = (f"{pick(run.frames[-1] for run in one.runs):,.0f}" for pick in (min, max))
        means = [[run.parts[part] for run in one.runs if part in run.parts] for part in parts]
        rows.append(
            [
                one.label,
                shortest if shortest == longest else f"{shortest} to {longest}",
                _with_spread(one.final),
                *(differences[one.label] if compared else ()),
                *(_number(float(np.mean(values))) if values else "-" for values in means),
                _with_spread(one.area),
                _speed([run.frames_per_second for run in one.runs]),
            ]
        )
    return Environment(name, series, header, rows, folder / f"{_slug(name)}.png")


def _by_number(name: str) -> list[str | int]:
    """A key that puts episode 2 before episode 10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _with_spread(values: Array) -> str:
    low, high = bootstrap_interval(values)
    return _interval(float(interquartile_mean(values)), float(low), float(high), f"n={len(values)}", len(values))


def _differences(series: Sequence[Series], baseline: Series | None) -> dict[str, tuple[str, str]]:
    """For each method the difference to the baseline, and p, corrected for all of them."""
    told = {one.label: ("-", "-") for one in series}
    tested: dict[str, float] = {}
    for one in series:
        if baseline is None or one is baseline:
            continue
        mine, theirs = one.final, baseline.final
        seeds = f"n={len(mine)} v {len(theirs)}"
        if min(len(mine), len(theirs)) >= FEWEST_TESTED:
            difference, low, high, tested[one.label] = welch(mine, theirs)
            told[one.label] = (_interval(difference, low, high, seeds, FEWEST), "-")
            if np.isnan(low) and np.isfinite(difference):
                told[one.label] = (f"{_number(difference)}, no seed differs {seeds}", "-")
        else:
            difference = float(mine.mean() - theirs.mean())
            ends = float(mine.min() - theirs.max()), float(mine.max() - theirs.min())
            told[one.label] = (_interval(difference, *ends, seeds, 0), "-")
    for label, p in zip(tested, holm(list(tested.values())), strict=True):
        if np.isfinite(p):
            told[label] = (told[label][0], f"{p:.3f}" if p >= 0.0005 else "<0.001")
    return told


def _interval(middle: float, low: float, high: float, seeds: str, fewest: int) -> str:
    """Three figures with as many decimals as show two digits of the largest, at least two below a thousand."""
    size = max((abs(value) for value in (middle, low, high) if np.isfinite(value)), default=0.0)
    decimals = 0 if size >= 1000 else 2 if size == 0 else max(2, 1 - math.floor(math.log10(size)))
    shown = [f"{round(value, decimals) + 0.0:,.{decimals}f}" for value in (middle, low, high)]
    around = f"({shown[1]} to {shown[2]})" if fewest < FEWEST else f"[{shown[1]}, {shown[2]}]"
    return f"{shown[0]} {around} {seeds}"


def _number(value: float) -> str:
    """Two decimals for returns of everyday size, three significant digits below that, none above thousands."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 or not np.isfinite(size) else f"{value:.3g}"


def _speed(speeds: Sequence[float]) -> str:
    known = [speed for speed in speeds if np.isfinite(speed)]
    return f"{np.median(known):,.0f}" if known else "-"


def _markdown(env: Environment) -> str:
    lines = [env.header, ["---", *["---:"] * (len(env.header) - 1)], *env.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [
        "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


# --- writing ---------------------------------------------------------------------------------------------------------


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "environment"


def _write(made: Report, runs: Sequence[Run], references: Mapping[str, float]) -> list[Path]:
    """Write the report's files and return their paths."""
    made.folder.mkdir(parents=True, exist_ok=True)
    # One colour for a method in all pictures of a report.
    colours = {label: i for i, label in enumerate(sorted({run.label for run in runs}))}
    files = []
    for name in sorted({run.environment for run in runs}):
        env = _environment(name, [run for run in runs if run.environment == name], made.folder, made.against)
        made.environments.append(env)
        _draw(env, made.metric, references, colours)
        table, data = (made.folder / f"{_slug(name)}-{what}.csv" for what in ("table", "curves"))
        _csv(table, [env.header, *env.rows])
        points = (
            [one.label, run.seed, run.id, f"{frame:.0f}", repr(float(value))]
            for one in env.series
            for run in one.runs
            for frame, value in zip(run.frames, run.values, strict=True)
        )
        _csv(data, [["method", "seed", "run_id", "frames", made.metric], *points])
        files += [env.picture, table, data]
    page = made.folder / "report.md"
    page.write_text(made.markdown, encoding="utf-8")
    return [page, *files]


def _csv(path: Path, lines: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)


def _log(client: MlflowClient, experiment_id: str, files: Sequence[Path], description: str) -> str:
    """Log the files to the experiment's run named "report", which is made if there is none; return its id."""
    earlier = client.search_runs([experiment_id], "tags.kind = 'report'", max_results=1)
    run = earlier[0] if earlier else client.create_run(experiment_id, tags={"kind": "report"}, run_name="report")
    run_id = str(run.info.run_id)
    client.set_tag(run_id, "mlflow.note.content", description)
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id)
    return run_id


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw(env: Environment, metric: str, references: Mapping[str, float], colours: Mapping[str, int]) -> None:
    """Draw the learning curves: a line for each method, shaded by its interval, named with its seeds where it ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, max(4.5, 0.26 * (len(env.series) + len(references)))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[tuple[float, str, str]] = []
    for one in env.series:
        number = colours[one.label]
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        frames, values = one.curves()
        middle = interquartile_mean(values)
        if len(one.runs) > 1:
            axes.fill_between(frames, *bootstrap_interval(values), color=colour, alpha=0.18, linewidth=0)
        marker = "o" if len(frames) == 1 else ""
        axes.plot(frames, middle, dash, color=colour, linewidth=2, marker=marker)
        shown = middle[np.isfinite(middle)]
        if len(shown):
            ends.append((float(shown[-1]), f"{one.label} (n={len(one.runs)})", colour))
    for label, height in references.items():
        axes.axhline(height, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        ends.append((height, label, "#666666"))
    axes.set_title(env.name, loc="left", fontweight="bold")
    axes.set_title(_shade([len(one.runs) for one in env.series]), loc="right", fontsize=8, color="#666666")
    over_frames(axes)
    axes.set_ylabel(metric)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    name_lines(axes, ends)
    figure.savefig(env.picture, dpi=150)


def _shade(seeds: Sequence[int]) -> str:
    """What the shaded areas of curves of so many seeds are."""
    several = [count for count in seeds if count > 1]
    names = ["95 % bootstrap interval"] if any(count >= FEWEST for count in several) else []
    if any(count < FEWEST for count in several):
        names.append(f"least to largest{f' where n < {FEWEST}' if names else ''}")
    return f"shaded: {', '.join(names)}" if names else ""
