"""Sources of experience: a loop over environments and a policy, replay, and their evaluation."""

from lightning_hyper.experience.base import Experience
from lightning_hyper.experience.collection import Collection, Policy, first_episodes
from lightning_hyper.experience.replay import Replay
from lightning_hyper.experience.rollouts import Rollouts

__all__ = ["Collection", "Experience", "Policy", "Replay", "Rollouts", "first_episodes"]
