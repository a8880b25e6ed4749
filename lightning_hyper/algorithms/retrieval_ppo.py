"""PPO whose value loss listens to an episodic memory."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.algorithms.ppo import PPO
from lightning_hyper.memory import EpisodeRecorder, EpisodicMemory
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.retriever import Recall, RetrieverFactory
from lightning_hyper.objectives import Alpha, DynamicAlpha


class RetrievalPPO(PPO):
    """Multi-task PPO with task-adaptive retrieval.

    Completed episodes enter a memory; a retriever compares each observation with the memory's and mixes their values
    into V_mem; the value loss is (1 - alpha) (V - R)^2 + alpha (V - V_mem)^2. Acting, returns and advantages know
    nothing of the memory.

    Args:
        retriever: makes the retriever.
        memory: the episodic memory; each rank has one of its own experience.
        alpha: the rule for alpha.
        options: as in `PPO`.

    Source: arXiv 2306.10698.
    """

    def __init__(
        self, *, retriever: RetrieverFactory, memory: EpisodicMemory, alpha: Alpha | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.make_retriever, self.memory, self.alpha = retriever, memory, alpha or DynamicAlpha()

    def build(self, spaces: Spaces) -> None:
        super().build(spaces)
        agent = self.agent
        self.retriever = self.make_retriever(agent.features, agent.task.out_features if agent.task is not None else 0)
        if self.retriever.projection is not None and agent.task is None:
            raise ValueError("model.retriever.projection needs a context: name a model.task")
        if self.retriever.subset is not None and self.retriever.subset > self.memory.capacity:
            raise ValueError(
                f"model.memory.capacity is {self.memory.capacity}, below the {self.retriever.subset} entries of "
                "model.retriever.subset"
            )
        self.recorder: EpisodeRecorder | None = None

    def check(self, num_envs: int, steps: int) -> None:
        super().check(num_envs, steps)
        if self.recorder is None:
            horizon: int = self.trainer.datamodule.env.horizon  # type: ignore[attr-defined]
            self.recorder = EpisodeRecorder(horizon, self.gamma)
            assert self.spaces is not None
            seed = torch.initial_seed() + self.trainer.global_rank
            self.memory.begin(self.spaces.image, self.spaces.missions, seed, self.device)

    def learn(self, batch: TensorDict) -> list[dict[str, Tensor]]:
        assert self.recorder is not None
        self.memory.insert(self.recorder.completed(batch))
        updates = super().learn(batch)
        held = torch.tensor(float(len(self.memory)), device=self.device)
        return [{**update, "memory_size": held} for update in updates]

    def losses(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        decided, recall = self.recall(part)
        if recall is None:
            losses = self.compare(part, decided)
            # DDP reduces every parameter in every backward, also on a rank whose memory is still empty.
            idle = [0.0 * parameter.sum() for parameter in self.retriever.parameters()]
            return {**losses, "total": losses["total"] + sum(idle)}
        alpha = self.alpha(recall.confidence, self.clock.progress) * recall.known
        losses = self.compare(part, decided, (recall.value, alpha))
        error = (recall.value.detach() - part["target"]).square().mean()
        return {**losses, "alpha": alpha.mean(), "memory_error": error}

    def recall(self, part: dict[str, Tensor], places: Tensor | None = None) -> tuple[Tensor, Recall | None]:
        """Features of the decision layer and what the memory says of a minibatch, with the arguments of `Retriever`."""
        seen = part["observation"], part["task"], part["mission"]
        found: tuple[Tensor, Recall | None] = self.retriever(self.agent, *seen, self.memory, places=places)
        return found

    def rank_state(self) -> dict[str, Any]:
        if self.recorder is None:
            return {}
        return {
            "memory": self.memory.state_dict(),
            "recorder": self.recorder.state_dict(),
            "keys": self.retriever.kept_keys(),
        }

    def load_rank_state(self, state: dict[str, Any]) -> None:
        assert self.recorder is not None
        self.memory.load_state_dict(state["memory"], self.device)
        self.recorder.load_state_dict(state["recorder"], self.device)
        self.retriever.restore_keys(state["keys"], self.device)
