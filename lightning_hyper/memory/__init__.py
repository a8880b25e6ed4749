"""Episodic memory: what was stored, when, and its state."""

from lightning_hyper.memory.episodic import EpisodicMemory
from lightning_hyper.memory.recorder import EpisodeRecorder

__all__ = ["EpisodeRecorder", "EpisodicMemory"]
