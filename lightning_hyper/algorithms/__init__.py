"""Algorithms: one LightningModule each, in the order of the paper's pseudocode."""

from lightning_hyper.algorithms.base import Algorithm, FrameClock, NonFiniteLossError
from lightning_hyper.algorithms.meta_ppo import MetaPPO
from lightning_hyper.algorithms.sac import SAC
from lightning_hyper.algorithms.td3 import TD3

__all__ = ["Algorithm", "FrameClock", "MetaPPO", "NonFiniteLossError", "SAC", "TD3"]
