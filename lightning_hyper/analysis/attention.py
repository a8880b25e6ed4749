"""A callback that watches whose memories each task attends to, and how much they count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.algorithms.retrieval_ppo import RetrievalPPO
from lightning_hyper.analysis.figures import over_frames, short_task, without_box
from lightning_hyper.analysis.measurements import Measurements
from lightning_hyper.checks import RecipeError
from lightning_hyper.objectives import DynamicAlpha

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
DRAWS = 16  # subsets of the memory that alpha is measured with


class Attention(Measurements):
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
        RecipeError: a number out of range; when training begins, a model without a memory, or an environment without
            tasks that are an index.
    """

    def __init__(self, *, every: int = 50_000, observations: int = 512) -> None:
        super().__init__("attention", every, observations=observations)
        self.observations = observations
        self.matrix: list[list[float]] = []  # weight from each task (row) on each task's entries, at the last row

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, RetrievalPPO):
            raise RecipeError(f"{self.key}: model {type(pl_module).__name__} has no memory; take RetrievalPPO")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now has the model been told what data.env shows.
        assert isinstance(pl_module, RetrievalPPO)
        assert pl_module.spaces is not None
        if not pl_module.spaces.tasks:
            raise RecipeError(f"{self.key}: data.env shows no tasks that are an index, between which to compare")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TensorDict, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RetrievalPPO)
        if self.due(trainer, pl_module) and len(pl_module.memory):
            metrics, matrix = self.measure(pl_module, batch)
            self.matrix = matrix.tolist()
            self.add(trainer, pl_module, metrics)

    @torch.no_grad()
    def measure(self, model: RetrievalPPO, batch: TensorDict) -> tuple[dict[str, float], Tensor]:
        """What is logged, and the weights from task to task.

        Args:
            model: with something in its memory.
            batch: as collected, `[num_envs, time]`.

        Returns:
            Metrics by name without `attention/`, and weights `[tasks, tasks]`.
        """
        assert model.spaces is not None
        agent, count = model.agent, len(model.spaces.tasks)
        generator = torch.Generator().manual_seed(model.clock.frames)
        rows = torch.randperm(batch["task"].numel(), generator=generator)[: self.observations].to(batch["task"].device)
        # Each observation as a window of one step, with the state of its context source before it.
        keys = dict.fromkeys([*agent.window_keys, "task"])
        seen = {key: batch[key].flatten(0, 1)[rows].unsqueeze(1) for key in keys}
        if agent.state_features:
            seen["context_state"] = batch["context_state"].flatten(0, 1)[rows]
        with unnoticed(model):
            recall = model.recall(seen, model.memory.draw())[-1]
            drawn = [model.recall(dict(part))[-1] for part in TensorDict(seen, batch_size=len(rows)).chunk(DRAWS)]
        assert recall is not None
        task = seen["task"].squeeze(1)
        from_task = torch.nn.functional.one_hot(task, count).float()
        to_task = torch.nn.functional.one_hot(model.memory.at(recall.places)["task"], count).float()
        matrix = (from_task.T @ recall.weights @ to_task) / from_task.sum(0).clamp(min=1).unsqueeze(1)
        confidence = torch.cat([each.confidence for each in drawn if each is not None])
        known = torch.cat([each.known for each in drawn if each is not None])
        alpha = model.alpha(confidence, model.clock.progress) * known
        low, quarter, median, three_quarters, high = alpha.quantile(alpha.new_tensor(QUANTILES)).tolist()
        own = (recall.weights @ to_task).gather(1, task.unsqueeze(1)).squeeze(1)
        chance = to_task.mean(0)[task]
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
        return {**super().state_dict(), "matrix": self.matrix}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.matrix = list(state_dict["matrix"])

    def draw(self, model: RetrievalPPO) -> Figure:
        """Weights from task to task at the last row, alpha and attention to the own task over frames."""
        from matplotlib.figure import Figure

        assert model.spaces is not None
        names = [short_task(task) for task in model.spaces.tasks]
        side = 3.5 + 0.28 * len(names)
        figure = Figure(figsize=(side + 6, max(4.5, side)), layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=[side, 6])
        left, right = halves
        axes = left.add_subplot()
        image = axes.imshow(self.matrix, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_title("Attention of a task (row)\nto memories of a task (column)", loc="left", fontweight="bold")
        if len(names) <= 12:
            for row, weights in enumerate(self.matrix):
                for column, weight in enumerate(weights):
                    shade = "white" if weight > 0.55 else "#333333"
                    axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=shade, fontsize=7)
        left.colorbar(image, shrink=0.6)
        upper, lower = right.subplots(2, 1, sharex=True)
        frames = [row["frames"] for row in self.rows]
        over = {key: [row[key] for row in self.rows] for key in self.rows[-1]}
        for low, high, shade in (("alpha_10", "alpha_90", "#CFE3F2"), ("alpha_25", "alpha_75", "#8FBFE0")):
            upper.fill_between(frames, over[low], over[high], color=shade, linewidth=0)
        upper.plot(frames, over["alpha"], color="#0072B2", linewidth=2)
        upper.set_title("Alpha: median, middle half, middle 80 %", loc="left", fontweight="bold")
        lower.plot(frames, over["own_task"], color="#D55E00", linewidth=2, label="weight on own task")
        if "above_floor" in over:
            label = "share with alpha above its floor"
            lower.plot(frames, over["above_floor"], "--", color="#444444", linewidth=2, label=label)
        lower.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
        without_box(upper)
        over_frames(lower)
        for panel in (upper, lower):
            panel.set_ylim(0, 1.02)
        return figure


@contextmanager
def unnoticed(model: RetrievalPPO) -> Iterator[None]:
    """Ask the memory without a trace: keys kept between calls and the generator of its draws stay as they are."""
    keys, generator = model.cache.save_state(), model.memory.generator.get_state()
    try:
        yield
    finally:
        model.cache.load_state(keys, model.device)
        model.memory.generator.set_state(generator)
