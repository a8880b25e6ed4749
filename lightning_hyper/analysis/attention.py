"""A callback that watches whose memories each task attends to, and how much they count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.algorithms.retrieval_ppo import RetrievalPPO
from lightning_hyper.analysis.report import short_task
from lightning_hyper.objectives import DynamicAlpha
from lightning_hyper.training.mlflow import MLflowLogger

NAME = "trainer.callbacks Attention"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
DRAWS = 16  # subsets of the memory that alpha is measured with


class Attention(Callback):
    """Measures every so many frames how observations just collected attend to the memory.

    Logs `attention/own_task`, the weight on entries of the observation's own task where the whole memory is asked, and
    `attention/own_over_chance`, that over the share of those entries in the memory. With subsets drawn as in training
    it logs the median of alpha `attention/alpha`, its quantiles `attention/alpha_10` to `attention/alpha_90`, and
    `attention/above_floor`, the share of observations whose largest weight is above the floor of a dynamic alpha. When
    training ends it draws them, and the weights from task to task. Training is left as it would be without it.

    Args:
        every: frames between measurements.
        observations: how many are measured, drawn from one collected batch.

    Raises:
        ValueError: a number out of range; by `setup`, a model without a memory.
    """

    def __init__(self, *, every: int = 50_000, observations: int = 512) -> None:
        for key, value in (("every", every), ("observations", observations)):
            if value < 1:
                raise ValueError(f"{NAME}.{key} is {value}; it must be at least 1")
        self.every, self.observations = every, observations
        self.rows: list[dict[str, float]] = []
        self.matrix: list[list[float]] = []  # weight from each task (row) on each task's entries, at the last row

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, RetrievalPPO):
            raise ValueError(f"{NAME}: model {type(pl_module).__name__} has no memory; take RetrievalPPO")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TensorDict, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RetrievalPPO)
        frames = pl_module.clock.frames
        measured = self.rows[-1]["frames"] if self.rows else 0
        if frames // self.every <= measured // self.every or not trainer.is_global_zero or not len(pl_module.memory):
            return
        metrics, matrix = self.measure(pl_module, batch)
        self.rows.append({"frames": frames, **metrics})
        self.matrix = matrix.tolist()
        for logger in trainer.loggers:
            logger.log_metrics({f"attention/{name}": value for name, value in metrics.items()}, frames)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.rows or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, RetrievalPPO)
        assert pl_module.spaces is not None
        path = Path(trainer.default_root_dir) / "attention.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(self.rows, self.matrix, pl_module.spaces.tasks).savefig(path, dpi=150)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowLogger):
                logger.log_artifact(path, "pictures")

    @torch.no_grad()
    def measure(self, model: RetrievalPPO, batch: TensorDict) -> tuple[dict[str, float], Tensor]:
        """What is logged, by name without `attention/`, and the weights `[tasks, tasks]` from task to task."""
        task = batch["task"].flatten()
        generator = torch.Generator().manual_seed(model.clock.frames)
        rows = torch.randperm(len(task), generator=generator)[: self.observations].to(task.device)
        seen = {key: batch[key].flatten(0, 1)[rows] for key in ("observation", "task", "mission")}
        keys, generator_state = model.retriever.kept_keys(), model.memory.generator.get_state()
        _, recall = model.recall(seen, model.memory.draw())
        drawn = [model.recall(part)[1] for part in TensorDict(seen, batch_size=len(rows)).chunk(DRAWS)]
        model.retriever.restore_keys(keys, model.device)
        model.memory.generator.set_state(generator_state)
        assert recall is not None
        entries = model.memory.tasks_at(recall.places)
        count = len(model.memory.missions)
        from_task = torch.nn.functional.one_hot(seen["task"], count).float()
        to_task = torch.nn.functional.one_hot(entries, count).float()
        matrix = (from_task.T @ recall.weights @ to_task) / from_task.sum(0).clamp(min=1).unsqueeze(1)
        confidence = torch.cat([each.confidence for each in drawn if each is not None])
        known = torch.cat([each.known for each in drawn if each is not None])
        alpha = model.alpha(confidence, model.clock.progress) * known
        low, quarter, median, three_quarters, high = alpha.quantile(alpha.new_tensor(QUANTILES)).tolist()
        own = (recall.weights @ to_task).gather(1, seen["task"].unsqueeze(1)).squeeze(1)
        chance = to_task.mean(0)[seen["task"]]
        metrics = {
            "own_task": float(own.mean()),
            "own_over_chance": float(own[chance > 0].mean() / chance[chance > 0].mean()) if chance.any() else 0.0,
            "alpha": median,
            "alpha_10": low,
            "alpha_25": quarter,
            "alpha_75": three_quarters,
            "alpha_90": high,
        }
        if isinstance(model.alpha, DynamicAlpha):
            metrics["above_floor"] = float((confidence > model.alpha.floor).float().mean())
        return metrics, matrix

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "matrix": self.matrix}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.matrix = list(state_dict["rows"]), list(state_dict["matrix"])


def draw(rows: Sequence[dict[str, float]], matrix: Sequence[Sequence[float]], tasks: Sequence[str]) -> Any:
    """A figure: weights from task to task at the last row, alpha and attention to the own task over frames."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    names = [short_task(task) for task in tasks]
    side = 3.5 + 0.28 * len(tasks)
    figure = Figure(figsize=(side + 6, max(4.5, side)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[side, 6])
    left, right = halves
    axes = left.add_subplot()
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Attention of a task (row)\nto memories of a task (column)", loc="left", fontweight="bold")
    if len(tasks) <= 12:
        for row, weights in enumerate(matrix):
            for column, weight in enumerate(weights):
                shade = "white" if weight > 0.55 else "#333333"
                axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=shade, fontsize=7)
    left.colorbar(image, shrink=0.6)
    upper, lower = right.subplots(2, 1, sharex=True)
    frames = [row["frames"] for row in rows]
    for low, high, shade in (("alpha_10", "alpha_90", "#CFE3F2"), ("alpha_25", "alpha_75", "#8FBFE0")):
        upper.fill_between(frames, [row[low] for row in rows], [row[high] for row in rows], color=shade, linewidth=0)
    upper.plot(frames, [row["alpha"] for row in rows], color="#0072B2", linewidth=2)
    upper.set_title("Alpha: median, middle half, middle 80 %", loc="left", fontweight="bold")
    lower.plot(frames, [row["own_task"] for row in rows], color="#D55E00", linewidth=2, label="weight on own task")
    if "above_floor" in rows[-1]:
        above = [row["above_floor"] for row in rows]
        lower.plot(frames, above, "--", color="#444444", linewidth=2, label="share with alpha above its floor")
    lower.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    lower.set_xlabel("environment frames")
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    lower.xaxis.set_major_locator(MaxNLocator(6))
    for panel in (upper, lower):
        panel.set_ylim(0, 1.02)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        panel.set_axisbelow(True)
    return figure
