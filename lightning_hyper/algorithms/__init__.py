"""Algorithms: one LightningModule each, in the order of the paper's pseudocode."""

from lightning_hyper.algorithms.base import Algorithm, FrameClock, NonFiniteLossError
from lightning_hyper.algorithms.ppo import PPO
from lightning_hyper.algorithms.retrieval_ppo import RetrievalPPO
from lightning_hyper.algorithms.sac import SAC
from lightning_hyper.algorithms.td3 import TD3

__all__ = ["Algorithm", "FrameClock", "NonFiniteLossError", "PPO", "RetrievalPPO", "SAC", "TD3"]
