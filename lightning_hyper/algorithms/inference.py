"""Training of a context source by an objective of its own, beside whatever algorithm acts on its contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.memory import TrialStore
from lightning_hyper.modules.context import ContextSource, InferredContext

GROUP = "inference"
Update = Callable[..., dict[str, Tensor]]


class Inference:
    """Keeps whole trials, and updates a source on some of them after each collected batch.

    Args:
        source: has an objective.
    """

    def __init__(self, source: InferredContext) -> None:
        self.source, self.store = source, TrialStore(source.capacity, source.trial_keys)

    @staticmethod
    def of(context: ContextSource | None) -> Inference | None:
        """That of an agent's context, where it has an objective of its own."""
        source = context.inferred if context is not None else None
        return None if source is None else Inference(source)

    def group(self) -> dict[str, Any]:
        """Its parameters, as an optimiser takes them: Adam's usual epsilon and no clipping, as published."""
        own = {"lr": self.source.lr, "eps": 1e-8, "max_grad_norm": None}
        return {"name": GROUP, "params": list(self.source.parameters()), **own}

    def learn(self, batch: TensorDict, update: Update) -> list[dict[str, Tensor]]:
        """Take in a batch and make its updates; gives what each measured, nothing while there are too few trials."""
        self.store.add(batch)
        if len(self.store) < self.source.trials:
            return []
        measured = []
        for _ in range(self.source.updates):
            losses = self.source.objective(*self.store.sample(self.source.trials))
            update(losses["total"], [GROUP])
            measured.append({f"{GROUP}_{name}": loss for name, loss in losses.items()})
        return measured

    def save_state(self) -> dict[str, Any]:
        return self.store.save_state()

    def load_state(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        self.store.load_state(state, device)
