"""Tensordict modules: the parts of an agent that a recipe names."""

from lightning_hyper.modules.agent import MetaAgent
from lightning_hyper.modules.context import ContextSource, OracleContext, RecurrentContext
from lightning_hyper.modules.normalization import ReturnScale, RunningNorm
from lightning_hyper.modules.spaces import Spaces

__all__ = ["ContextSource", "MetaAgent", "OracleContext", "RecurrentContext", "ReturnScale", "RunningNorm", "Spaces"]
