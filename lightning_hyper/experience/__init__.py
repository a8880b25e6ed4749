"""Sources of experience: LightningDataModules around TorchRL collectors."""

from lightning_hyper.experience.trials import TrialRollouts

__all__ = ["TrialRollouts"]
