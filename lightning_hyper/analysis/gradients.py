"""How true a critic's action gradient is: dQ/da of the critic beside that of returns in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.envs import BatchedEnv
from lightning_hyper.modules.policies import BoundedPolicy

Minibatch = TypeVar("Minibatch")


class Critic(Protocol):
    """What is measured: a Q-function of standardised observations and scaled actions."""

    def value(self, state: Tensor, action: Tensor) -> Tensor:
        """Values `[states]` for states `[states, features]` and actions `[states, actions]`."""


@dataclass
class States:
    """Where environments stood.

    Attributes:
        simulator: entries of `save_state`, one row for each state.
        observation: what each showed, `[states, features]`.
    """

    simulator: dict[str, Tensor]
    observation: Tensor

    def repeated(self, count: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`simulator` of those states, each `count` times over."""
        return {
            name: entry if name == "generator" else entry[rows].repeat_interleave(count, 0)
            for name, entry in self.simulator.items()
        }


def sample_states(env: BatchedEnv, policy: BoundedPolicy, *, within: int, generator: torch.Generator) -> States:
    """One state of each environment: where exploration has brought it by a random frame of the first `within`."""
    when = torch.randint(within, (env.batch_size[0],), generator=generator)
    seed = int(torch.randint(2**31, (), generator=generator))
    with apart(seed), torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        env.set_seed(seed)
        step = env.reset()
        states = States(env.save_state(), step["observation"].clone())
        for frame in range(1, int(when.max()) + 1):
            _, step = env.step_and_maybe_reset(policy(step))
            chosen = when == frame
            if not chosen.any():
                continue
            states.observation[chosen] = step["observation"][chosen]
            for name, rows in env.save_state().items():
                if name != "generator":
                    states.simulator[name][chosen] = rows[chosen]
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
        env.load_state(states.repeated(each, group))
        found = _returns(env, policy, first[group].reshape(width, dimensions), horizon, gamma)
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


def critic_action_gradient(critic: Critic, policy: BoundedPolicy, states: Tensor, actions: Tensor) -> Tensor:
    """dQ/da `[states, actions]` of a critic, its first Q-function where it has two.

    Args:
        critic: the Q-function.
        policy: standardises observations as the critic expects them.
        states: observations `[states, features]`.
        actions: `[states, actions]`, scaled to [-1, 1].
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, scaled = policy.norm(states.clone()), actions.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic.value(x, scaled).sum(), scaled)
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
    """Raise ValueError where so few rollouts leave a fit undetermined."""
    if rollouts <= dimensions:
        raise ValueError(
            f"{prefix}rollouts is {rollouts}; a linear fit in {dimensions} dimensions of the action needs at least "
            f"{dimensions + 1}"
        )


@torch.no_grad()
def _returns(env: BatchedEnv, policy: BoundedPolicy, first: Tensor, horizon: int, gamma: float) -> Tensor:
    """Discounted returns `[num_envs]`, float64, from where `env` stands, after scaled first actions."""
    action = first if policy.is_unit else policy.centre + policy.reach * first
    total = torch.zeros(len(first), dtype=torch.float64)
    alive = torch.ones(len(first), dtype=torch.bool)
    for frame in range(horizon):
        observation, reward, terminated = env.advance(action)
        # Not a product: what a simulator says after its end may not be a number.
        total += torch.where(alive, gamma**frame * reward.double(), 0.0)
        alive &= ~terminated
        if not alive.any():
            break
        action = most_likely(policy, observation)
    return total


@torch.no_grad()
def most_likely(policy: BoundedPolicy, observation: Tensor) -> Tensor:
    """The most likely actions, in the environment's units."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        acted = policy(TensorDict({"observation": observation}, batch_size=observation.shape[:1]))
    return cast(Tensor, acted["action"])


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Draw from global generators of this seed, and leave them as they were before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    numpy = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(numpy)
