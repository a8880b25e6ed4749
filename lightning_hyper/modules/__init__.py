"""Tensordict modules: the parts of an agent that a recipe names."""

from lightning_hyper.modules.actor_critic import ActorCritic
from lightning_hyper.modules.conditioned import ConditionedPolicy
from lightning_hyper.modules.context import ConstantContext, Contexts, ContextSource, InferredContext
from lightning_hyper.modules.decoders import (
    CellRewardDecoder,
    Decoder,
    ObservationDecoder,
    RewardDecoder,
    TaskDecoder,
)
from lightning_hyper.modules.joined_context import JoinedContext
from lightning_hyper.modules.normalization import NoNorm, ReturnScale, RunningNorm
from lightning_hyper.modules.observation import ObservationEncoder
from lightning_hyper.modules.recurrent_context import RecurrentContext
from lightning_hyper.modules.task_context import OneHotContext, TaskContext, TextContext
from lightning_hyper.modules.variational_context import VariationalContext

__all__ = [
    "ActorCritic",
    "CellRewardDecoder",
    "ConditionedPolicy",
    "ConstantContext",
    "ContextSource",
    "Contexts",
    "Decoder",
    "InferredContext",
    "JoinedContext",
    "NoNorm",
    "ObservationDecoder",
    "ObservationEncoder",
    "OneHotContext",
    "RecurrentContext",
    "ReturnScale",
    "RewardDecoder",
    "RunningNorm",
    "TaskContext",
    "TaskDecoder",
    "TextContext",
    "VariationalContext",
]
