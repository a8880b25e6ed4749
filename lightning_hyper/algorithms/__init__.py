"""Algorithms: one LightningModule each, in the order of the paper's pseudocode."""

from lightning_hyper.algorithms.base import Algorithm, FrameClock, NonFiniteLossError
from lightning_hyper.algorithms.meta_ppo import MetaPPO

__all__ = ["Algorithm", "FrameClock", "MetaPPO", "NonFiniteLossError"]
