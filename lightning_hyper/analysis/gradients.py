"""How true a critic's action gradient is: dQ/da of the critic beside that of returns in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.analysis.looking import apart
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.modules.context import Contexts, Window
from lightning_hyper.modules.policies import BoundedPolicy

Minibatch = TypeVar("Minibatch")


class Critic(Protocol):
    """What is measured: a Q-function of scaled actions."""

    def value(self, window: Window, action: Tensor, task: Contexts | None = None) -> Tensor:
        """Values `[states]` for entries `[states, ...]`, actions `[states, actions]` and contexts `[states]`."""


@dataclass
class States:
    """Where environments stood, and what the policy knew there.

    Attributes:
        simulator: the environments' `save_state`, with a row for each state.
        context_state: of the policy before it acts there, `[states, state_features]`; None where it has none.
    """

    simulator: dict[str, Any]
    context_state: Tensor | None = None

    @property
    def shown(self) -> dict[str, Tensor]:
        """What each environment showed, entries `[states, ...]`."""
        return cast(dict[str, Tensor], self.simulator["current"])

    def repeated(self, count: int, rows: slice = slice(None)) -> States:
        """Those states, each `count` times over."""
        state = self.context_state
        return States(
            _repeated(self.simulator, count, rows),
            None if state is None else state[rows].repeat_interleave(count, 0),
        )


def _repeated(state: Mapping[str, Any], count: int, rows: slice) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in state.items():
        if isinstance(entry, Mapping):
            found[name] = _repeated(entry, count, rows)
        else:
            found[name] = entry if name == "generator" else entry[rows].repeat_interleave(count, 0)
    return found


def _put(into: dict[str, Any], state: Mapping[str, Any], rows: Tensor) -> None:
    for name, entry in state.items():
        if isinstance(entry, Mapping):
            _put(into[name], entry, rows)
        elif name != "generator":
            into[name][rows] = entry[rows]


def sample_states(env: BatchedEnv, policy: BoundedPolicy, *, within: int, generator: torch.Generator) -> States:
    """One state of each environment: where exploration has brought it by a random frame of the first `within`."""
    when = torch.randint(within, env.batch_size, generator=generator)
    seed = int(torch.randint(2**31, (), generator=generator))
    with apart(seed), torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        env.set_seed(seed)
        step: Any = env.begin()
        states, state = States(env.save_state()), None
        for frame in range(1, int(when.max()) + 1):
            chosen, state = policy.act(step, state)
            done = env.advance(chosen["action"])["done"]
            step = env.begin(done.squeeze(-1)) if done.any() else env.current
            rows = when == frame
            if state is not None and states.context_state is None:
                states.context_state = torch.zeros_like(state)  # as good as none, where an episode begins
            if rows.any():
                _put(states.simulator, env.save_state(), rows)
                if state is not None and states.context_state is not None:
                    states.context_state[rows] = state[rows]
    return states


def true_action_gradient(
    env: BatchedEnv,
    policy: BoundedPolicy,
    states: States,
    actions: Tensor,
    *,
    rollouts: int = 15,
    horizon: int = 50,
    sigma: float = 0.3,
    gamma: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Gradient of the policy's discounted return in the first action, by perturbing that action in the simulator.

    Around each action, `rollouts` first actions a + delta, delta ~ N(0, sigma^2) cut off at the bounds, are each
    followed by the most likely actions; returns are fitted by least squares as a linear function of delta. That is
    done twice over, so that the two fits show how far one of them can be trusted.

    Args:
        env: environment of its own, as wide as twice the `rollouts` of all states together, or of an equal share of
            the states, which then take turns.
        policy: what acts after the first action.
        states: where to begin.
        actions: `[states, actions]`, scaled to [-1, 1].
        rollouts: first actions of one fit; more than there are dimensions of the action.
        horizon: frames of each return, which ends there without a bootstrap, or where the episode terminates.
        sigma: standard deviation of a perturbation, in units of scaled actions.
        gamma: discount per frame.
        generator: draws the perturbations.

    Returns:
        gradients `[states, actions]` per scaled action, by one fit to all the rollouts, and `[2, states, actions]` by
        a fit to each half of them.

    Raises:
        ValueError: rollouts too few for a fit; an environment of another size.

    Source: arXiv 2106.06842 (Sarafian et al. 2021): 15 rollouts and a local least-mean-squares fit.
    """
    count, dimensions = actions.shape
    check_rollouts(rollouts, dimensions)
    width, each = env.batch_size[0], 2 * rollouts
    if width % each or count % (together := width // each):
        raise ValueError(
            f"env.num_envs is {width}; {count} states need {count * each}, or that by a divisor of {count}"
        )
    noise = sigma * torch.randn(count, each, dimensions, generator=generator)
    first = (actions[:, None] + noise).clamp(-1, 1)
    returns = torch.empty(count, each, dtype=torch.float64)
    for start in range(0, count, together):
        group = slice(start, start + together)
        found = _returns(
            env, policy, states.repeated(each, group), first[group].reshape(width, dimensions), horizon, gamma
        )
        returns[group] = found.reshape(together, each)
    delta = (first - actions[:, None]).double()
    halves = [slope(delta[:, part], returns[:, part]) for part in (slice(rollouts), slice(rollouts, None))]
    return slope(delta, returns), torch.stack(halves)


def slope(x: Tensor, y: Tensor) -> Tensor:
    """Slopes `[*B, features]` of the least-squares fit, with an intercept, of y `[*B, n]` to x `[*B, n, features]`."""
    design = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    # A direction that the bounds leave no room for has slope 0: the solution of least norm.
    fitted: Tensor = torch.linalg.lstsq(design, y[..., None], driver="gelsd").solution
    return fitted[..., :-1, 0]


def critic_action_gradient(critic: Critic, policy: BoundedPolicy, states: States, actions: Tensor) -> Tensor:
    """dQ/da `[states, actions]` of a critic, its first Q-function where it has two.

    Args:
        critic: the Q-function.
        policy: whose context source the critic is told the task by.
        states: where.
        actions: `[states, actions]`, scaled to [-1, 1].
    """
    shown = {name: entry.clone() for name, entry in states.shown.items()}
    with torch.inference_mode(False), torch.enable_grad():
        contexts = None
        if policy.context is not None:
            window = {key: shown[key].unsqueeze(1) for key in policy.window_keys}
            with torch.no_grad():
                contexts = policy.contexts(window, policy.observation(window), states.context_state)[0].flat()
        scaled = actions.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic.value(shown, scaled, contexts).sum(), scaled)
    return gradient


def gradient_similarity(critic: Tensor, true: Tensor, halves: Tensor) -> dict[str, float]:
    """How well gradients agree in direction, over states.

    Args:
        critic: gradients of the critic, `[states, actions]`.
        true: gradients of the return, `[states, actions]`.
        halves: two independent estimates of `true`, `[2, states, actions]`.

    Returns:
        `cosine`: mean over states between critic and truth. `reliability`: between the halves of the truth, without
        which the cosine says nothing. `vanishing`: share of states whose true gradient is within two of its own
        standard errors of zero.
    """
    first, second = halves
    # The mean of two estimates that differ by d has a standard error of d / 2.
    error = (first - second).norm(dim=-1) / 2
    return {
        "cosine": float(cosine_similarity(critic.double(), true.double(), dim=-1).mean()),
        "reliability": float(cosine_similarity(first, second, dim=-1).mean()),
        "vanishing": float((true.norm(dim=-1) <= 2 * error).double().mean()),
    }


def update_variance(
    loss: Callable[[Minibatch], Tensor], parameters: Sequence[Tensor], minibatches: Iterable[Minibatch]
) -> float:
    """Relative variance of a loss's gradient over minibatches: E |g_b - E g|^2 / |E g|^2.

    Args:
        loss: scalar loss of a minibatch.
        parameters: what it is differentiated in; their `grad` is left as it is.
        minibatches: those that expectations are over.
    """
    with torch.inference_mode(False), torch.enable_grad():
        gradients = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(loss(m), parameters)]) for m in minibatches]
        ).double()
    mean = gradients.mean(0)
    return float((gradients - mean).square().sum(1).mean() / mean.square().sum())


def check_rollouts(rollouts: int, dimensions: int, prefix: str = "") -> None:
    """Raise RecipeError where so few rollouts leave a fit undetermined."""
    if rollouts <= dimensions:
        raise RecipeError(
            f"{prefix}rollouts is {rollouts}; a linear fit in {dimensions} dimensions of the action needs at least "
            f"{dimensions + 1}"
        )


@torch.no_grad()
def _returns(
    env: BatchedEnv, policy: BoundedPolicy, states: States, first: Tensor, horizon: int, gamma: float
) -> Tensor:
    """Discounted returns `[num_envs]`, float64, from states `[num_envs]`, after scaled first actions."""
    env.load_state(states.simulator)
    step: Any = env.current
    state = states.context_state
    total = torch.zeros(len(first), dtype=torch.float64)
    alive = torch.ones(len(first), dtype=torch.bool)
    for frame in range(horizon):
        action, state = most_likely(policy, step, state)
        if frame == 0:
            action = first if policy.is_unit else policy.centre + policy.reach * first
        step = env.advance(action)
        # Not a product: what a simulator says after its end may not be a number.
        total += torch.where(alive, gamma**frame * step["reward"].squeeze(-1).double(), 0.0)
        alive &= ~step["terminated"].squeeze(-1)
        if not alive.any():
            break
    return total


@torch.no_grad()
def most_likely(policy: BoundedPolicy, step: Window, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The most likely actions in a step, in the environment's units, and the policy's state after it."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        chosen, state = policy.act(step, state)
    return chosen["action"], state
