"""Losses that `torchrl.objectives` lacks, or has otherwise than the papers."""

from lightning_hyper.objectives.ppo import PPOLoss

__all__ = ["PPOLoss"]
