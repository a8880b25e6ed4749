"""Losses that `torchrl.objectives` lacks, or has otherwise than the papers."""

from lightning_hyper.objectives.ppo import PPOLoss
from lightning_hyper.objectives.retrieval import Alpha, DecayingAlpha, DynamicAlpha, FixedAlpha

__all__ = ["Alpha", "DecayingAlpha", "DynamicAlpha", "FixedAlpha", "PPOLoss"]
