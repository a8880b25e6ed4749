"""Sources of experience: LightningDataModules around TorchRL collectors."""

from lightning_hyper.experience.base import Experience
from lightning_hyper.experience.replay import Replay
from lightning_hyper.experience.trials import TrialRollouts

__all__ = ["Experience", "Replay", "TrialRollouts"]
