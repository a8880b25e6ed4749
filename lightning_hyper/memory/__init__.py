"""Episodic memory: what was stored, when, and its state."""

from lightning_hyper.memory.episodic import EpisodicMemory
from lightning_hyper.memory.recorder import EpisodeRecorder
from lightning_hyper.memory.rules import BestReturn, Newest, Rule, TaskQuota, Uniform
from lightning_hyper.memory.trials import TrialStore

__all__ = ["BestReturn", "EpisodeRecorder", "EpisodicMemory", "Newest", "Rule", "TaskQuota", "TrialStore", "Uniform"]
