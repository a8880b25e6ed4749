"""Sources of experience: LightningDataModules around TorchRL collectors."""

from lightning_hyper.experience.base import Experience
from lightning_hyper.experience.replay import Replay
from lightning_hyper.experience.rollouts import EpisodeRollouts, TrialRollouts

__all__ = ["EpisodeRollouts", "Experience", "Replay", "TrialRollouts"]
