"""Q-functions as conditional networks: what of state, action and task is the input, and what the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_hyper.checks import RecipeError, at, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.conditioned import ConditionalFactory, uses_context
from lightning_hyper.modules.context import Contexts, Window
from lightning_hyper.modules.normalization import NoNorm, RunningNorm
from lightning_hyper.modules.observation import EncoderFactory, ObservationEncoder

Part = Literal["state", "action", "constant", "task"]
CONSTANT_FEATURES = 5  # as in the code of arXiv 2106.06842


class TwinCritic(nn.Module):
    """Two Q-functions f(x | c) of the same make.

    What `context` names is c; what it leaves of state, action and task is x, and so is a task that it does not name.
    `[state]` is the paper's SA-Hyper, a network of the action, `[action]` its AS-Hyper, and `[constant]` its control:
    five learned numbers, the same everywhere and for both. `[task]` tells the network which Q-function it is to be.
    The state is the observation, standardised as the policy's and encoded by an encoder of the critics' own.

    Args:
        spaces: sizes of the environment.
        network: makes a conditional network of (inputs, context, 1).
        context: what c is made of: `state`, `action`, `constant`, and `task`, the contexts of the agent's source.
        task_features: features of a context of the agent's source, 0 where there is none.
        encoder: makes an encoder of the observation from its shape; null leaves vectors as they are.
        norm: standardises observations, with the statistics of the policy; null leaves them.
        shared_trunk: one trunk for the two, instead of one each as in the paper.

    Raises:
        RecipeError: a context without meaning, a network that ignores it, a trunk to be shared where there is none.

    Source: arXiv 2106.06842 (Sarafian et al. 2021), sections 3 and 4.
    """

    @checked
    def __init__(
        self,
        spaces: Spaces,
        network: ConditionalFactory,
        *,
        context: Sequence[Part] = ("state",),
        task_features: int = 0,
        encoder: EncoderFactory | None = None,
        norm: NoNorm | RunningNorm | None = None,
        shared_trunk: bool = False,
    ) -> None:
        super().__init__()
        self.observation = ObservationEncoder(spaces, encoder)
        if norm is not None:
            self.observation.norm = norm
        sizes = {"state": self.observation.out_features, "action": spaces.actions, "task": task_features}
        self.context, self.inputs = _parts(context, bool(task_features))
        features = sum(CONSTANT_FEATURES if part == "constant" else sizes[part] for part in self.context)
        self.constant = nn.Parameter(torch.rand(CONSTANT_FEATURES)) if "constant" in self.context else None
        self.first: Any  # a network f(x | c) of whatever class
        self.second: Any
        with at("model.critic"):
            self.first, self.second = (network(sum(sizes[part] for part in self.inputs), features, 1) for _ in range(2))
        name, told = type(self.first).__name__, ", ".join(self.context)
        if self.context and not uses_context(self.first):
            raise RecipeError(
                f"model.critic: {name} as it is set ignores its context, which model.critic_context says is {told}; "
                "take Concat or Hyper"
            )
        if not getattr(self.first, "uses_input", True):
            raise RecipeError(f"model.critic: {name} ignores its input, {', '.join(self.inputs)}; take Concat or Hyper")
        self.shared_trunk = shared_trunk
        if shared_trunk:
            if getattr(self.first, "trunk", None) is None:
                raise RecipeError(f"model.shared_trunk: {name} as it is set has no trunk; name one, or do not share")
            self.second.share_trunk(self.first)

    def forward(self, window: Window, action: Tensor, task: Contexts | None = None) -> tuple[Tensor, Tensor]:
        """Values `[*B]` of both.

        Args:
            window: entries `[*B, ...]`, of which it reads the observation.
            action: scaled to [-1, 1], `[*B, actions]`.
            task: contexts `[*B]` of the agent's source, where there is one.
        """
        x, context = self._see(window, action, task)
        if self.shared_trunk:
            context = context.map(self.first.trunk)
            return _value(context, self.first.conditioned, x), _value(context, self.second.conditioned, x)
        return _value(context, self.first, x), _value(context, self.second, x)

    def value(self, window: Window, action: Tensor, task: Contexts | None = None) -> Tensor:
        """Values `[*B]` of the first alone."""
        x, context = self._see(window, action, task)
        return _value(context, self.first, x)

    def _see(self, window: Window, action: Tensor, task: Contexts | None) -> tuple[Tensor, Contexts]:
        """Input and context of the networks."""
        parts = {"state": cast(Tensor, self.observation(window)), "action": action}
        if self.constant is not None:
            parts["constant"] = self.constant
        if task is not None and self.context == ("task",):
            return _beside([parts[part] for part in self.inputs], action), task
        if task is not None:
            parts["task"] = task.each()
        context = _beside([parts[part] for part in self.context], action)
        return _beside([parts[part] for part in self.inputs], action), Contexts(context)


def _parts(context: Sequence[Part], has_task: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is the context, and what is left as input."""
    if len(set(context)) < len(context):
        raise RecipeError(f"model.critic_context is {list(context)}; name each part once")
    if "task" in context and not has_task:
        raise RecipeError(
            "model.critic_context names task, but there is no model.context; name a source, such as TaskContext"
        )
    inputs = tuple(part for part in ("state", "action", *(["task"] if has_task else [])) if part not in context)
    if not inputs:
        raise RecipeError(f"model.critic_context is {list(context)}, which leaves no input; leave state or action out")
    return tuple(context), inputs


def _beside(parts: list[Tensor], like: Tensor) -> Tensor:
    """Parts `[*B, features]` in one; a single one as it is, and none as no features."""
    if len(parts) < 2:
        return parts[0] if parts else like[..., :0]
    return torch.cat([part.expand(*like.shape[:-1], part.shape[-1]) for part in parts], -1)


def _value(context: Contexts, network: Any, x: Tensor) -> Tensor:
    return context.condition(network, x).squeeze(-1).float()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients through a module, but not to its parameters.

    What depends on none of the inputs that are differentiated then keeps no graph: where the state is the context, a
    policy step runs the trunk, which sees the state alone, without gradients.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
