"""Tensordict modules: the parts of an agent that a recipe names."""

from lightning_hyper.modules.actor_critic import ActorCritic
from lightning_hyper.modules.conditioned import ConditionedPolicy
from lightning_hyper.modules.context import ConstantContext, Contexts, ContextSource
from lightning_hyper.modules.joined_context import JoinedContext
from lightning_hyper.modules.normalization import NoNorm, ReturnScale, RunningNorm
from lightning_hyper.modules.observation import ObservationEncoder
from lightning_hyper.modules.recurrent_context import RecurrentContext
from lightning_hyper.modules.task_context import OneHotContext, TaskContext, TextContext

__all__ = [
    "ActorCritic",
    "ConditionedPolicy",
    "ConstantContext",
    "ContextSource",
    "Contexts",
    "JoinedContext",
    "NoNorm",
    "ObservationEncoder",
    "OneHotContext",
    "RecurrentContext",
    "ReturnScale",
    "RunningNorm",
    "TaskContext",
    "TextContext",
]
