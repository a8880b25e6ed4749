"""A callback that watches how true the critic's action gradient is while it learns."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_hyper.algorithms.off_policy import OffPolicy
from lightning_hyper.analysis.figures import over_frames
from lightning_hyper.analysis.gradients import (
    check_rollouts,
    critic_action_gradient,
    gradient_similarity,
    most_likely,
    sample_states,
    true_action_gradient,
    update_variance,
)
from lightning_hyper.analysis.looking import apart
from lightning_hyper.analysis.measurements import Measurements
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.experience.replay import Replay, Replayed
from lightning_hyper.experience.replay_buffer import split
from lightning_hyper.modules.critic import frozen
from lightning_hyper.training.run import experience

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 256  # rollouts side by side; a simulator takes a few megabytes


class GradientSimilarity(Measurements):
    """Measures every so many frames how the critic's action gradient compares with that of true returns.

    Logs, and draws over frames when training ends, `gradient/cosine` and its `gradient/reliability` (see
    `gradient_similarity`); logs `gradient/vanishing` and `gradient/update_variance`, that of the policy's gradient
    over minibatches of the replay buffer. Training is left as it would be without it.

    Args:
        name: of the metrics, in place of `gradient`, and of the picture; two protocols in one run need two.
        every: frames between measurements, made at the end of the batch in which they fall.
        states: states that are measured at, from as many episodes of the policy with its exploration noise.
        rollouts: perturbed actions of one fit, of which two are made. The paper's 15 leave much noise.
        horizon: frames of each return. Where contacts are chaotic, that of long ones is mostly noise (on HalfCheetah
            beyond 10); where they are not, as on Reacher, 50 frames tell more.
        sigma: standard deviation of the perturbations, in half ranges of the action, as the next one.
        protocol: measure at the policy's own action (`paper`), where a good policy's gradient vanishes, or at a
            distance of `offset` from it in a random direction.
        offset: that distance.
        within: largest frame of an episode that a state is taken at.
        minibatches: how many the variance is over.
        seed: of everything that is drawn here.

    Raises:
        RecipeError: a number out of range; when training begins, a model or an environment that cannot be measured.

    Source: arXiv 2106.06842 (Sarafian et al. 2021).
    """

    def __init__(
        self,
        *,
        name: str = "gradient",
        every: int = 5_000,
        states: int = 16,
        rollouts: int = 60,
        horizon: int = 10,
        sigma: float = 0.3,
        protocol: Literal["paper", "offset"] = "offset",
        offset: float = 0.5,
        within: int = 200,
        minibatches: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(name, every, states=states, horizon=horizon, within=within, minibatches=minibatches)
        for key, size in (("sigma", sigma), ("offset", offset)):
            if size <= 0:
                raise RecipeError(f"{self.key}.{key} is {size}; it must be positive")
        if protocol not in ("paper", "offset"):
            raise RecipeError(f"{self.key}.protocol is {protocol!r}; it must be 'paper' or 'offset'")
        self.states, self.rollouts, self.horizon, self.sigma = states, rollouts, horizon, sigma
        self.protocol, self.offset, self.within = protocol, offset, within
        self.minibatches, self.seed = minibatches, seed
        self._envs: tuple[BatchedEnv, BatchedEnv] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, OffPolicy):
            raise RecipeError(f"{self.key}: model {type(pl_module).__name__} has no Q-function; take TD3 or SAC")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        env = experience(trainer).env
        if not env.simulates:
            raise RecipeError(f"{self.key}: data.env {type(env).__name__} has no simulator to branch from")
        check_rollouts(self.rollouts, env.action_spec.shape[-1], f"{self.key}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Replayed, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, OffPolicy)
        data = cast(Replay, experience(trainer))
        if self.due(trainer, pl_module) and pl_module.clock.frames > data.warmup_frames:
            self.add(trainer, pl_module, self.measure(pl_module, data, batch.batch_size))

    def measure(self, model: OffPolicy, data: Replay, batch_size: int) -> dict[str, float]:
        """What is logged, by name without `gradient/`, for the model as it is now.

        Args:
            model: policy and critics.
            data: makes environments, and has the buffer.
            batch_size: samples of a minibatch.
        """
        generator = torch.Generator().manual_seed(self.seed + model.clock.frames)
        if self._envs is None:
            one = 2 * self.rollouts
            group = max(k for k in range(1, self.states + 1) if self.states % k == 0 and k * one <= max(one, WIDTH))
            sizes = self.states, group * one
            self._envs = cast(Any, tuple(data.make_env(num_envs=size, device="cpu") for size in sizes))
        explored, branched = self._envs
        policy, critics = (_on_cpu(module) for module in (model.agent, model.critics))
        states = sample_states(explored, policy, within=self.within, generator=generator)
        actions = policy.scaled(most_likely(policy, states.shown, states.context_state)[0])
        if self.protocol == "offset":
            direction = torch.randn(actions.shape, generator=generator)
            actions = (actions + self.offset * direction / direction.norm(dim=-1, keepdim=True)).clamp(-1, 1)
        true, halves = true_action_gradient(
            branched,
            policy,
            states,
            actions,
            rollouts=self.rollouts,
            horizon=self.horizon,
            sigma=self.sigma,
            gamma=model.gamma,
            generator=generator,
        )
        of_critic = critic_action_gradient(critics, policy, states, actions)
        metrics = gradient_similarity(of_critic, true, halves)
        with apart(self.seed + model.clock.frames), frozen(model.critics):
            blocks = data.buffer.blocks(self.minibatches, batch_size)
            metrics["update_variance"] = update_variance(
                lambda minibatch: model.actor_loss(minibatch)[0],
                [
                    parameter
                    for group in model.parameter_groups()
                    if group["name"] == "actor"
                    for parameter in group["params"]
                ],
                (minibatch for block in blocks for minibatch in split(model.preprocess(block), batch_size)),
            )
        return metrics

    def draw(self, model: OffPolicy) -> Figure:
        """`cosine` and `reliability` over frames."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        frames = [row["frames"] for row in self.rows]
        for name, label, colour, dash in (
            ("cosine", "critic and true return", "#0072B2", "-"),
            ("reliability", "two estimates of the true return", "#444444", "--"),
        ):
            heights = [row[name] for row in self.rows]
            axes.plot(frames, heights, dash, color=colour, linewidth=2, marker="o", markersize=4, label=label)
        axes.axhline(0, color="#888888", linewidth=1, zorder=0)
        axes.set_title("Action gradients: cosine between", loc="left", fontweight="bold")
        axes.set_ylim(min(0.0, *(row[name] for row in self.rows for name in ("cosine", "reliability"))) - 0.05, 1.05)
        over_frames(axes)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
        return figure


def _on_cpu(module: Any) -> Any:
    return module if next(module.parameters()).device.type == "cpu" else copy.deepcopy(module).cpu()
