"""What every policy shares: an encoding x and a context c of what the environment shows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, cast

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from lightning_hyper.checks import RecipeError, at
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.context import FEATURES, ContextFactories, Contexts, Role, Window
from lightning_hyper.modules.joined_context import make_context
from lightning_hyper.modules.observation import EncoderFactory, ObservationEncoder, features_of

ConditionalFactory = Callable[[int, int, int], nn.Module]
State = Tensor | None


class ConditionedPolicy(TensorDictModuleBase):
    """A policy whose networks are f(x | c), of an encoding x of the observation and a context c.

    As a tensordict module it reads one step `[num_envs, ...]` with the state `context_state`
    `[num_envs, state_features]` of its context source, where that has one, writes what it chooses, and replaces the
    state. It samples, or takes the most likely action under `ExplorationType.DETERMINISTIC`.

    Args:
        spaces: sizes of the environment.
        encoder: makes an encoder of the observation from its shape; null leaves vectors as they are.
        context: makes the context source, or several which are joined; null for none.
        embedding: makes an embedding of the context, shared by all that it conditions, from its shape.
        normalize_observation: standardise observations by running statistics.

    Attributes:
        features: features of x.
        context_features: features of c, 0 for none.
        window_keys: entries of a step that it reads.
        keep_states: whether a batch is to have the context source's state before each of its steps.

    Raises:
        RecipeError: an embedding of no context.
    """

    choices: ClassVar[tuple[str, ...]] = ("action",)  # entries that it writes
    trains_encoder: ClassVar[bool] = True  # whether the context's gradient reaches the encoder, where it sees features
    keep_states = False

    def __init__(
        self,
        spaces: Spaces,
        *,
        encoder: EncoderFactory | None = None,
        context: ContextFactories = None,
        embedding: EncoderFactory | None = None,
        normalize_observation: bool = False,
    ) -> None:
        super().__init__()
        self.observation = ObservationEncoder(spaces, encoder, normalize=normalize_observation)
        self.features = self.observation.out_features
        with at("model.context"):
            self.context = make_context(context, spaces, self.features)
        self.context_features = self.context.out_features if self.context is not None else 0
        self.embedding: nn.Module | None = None
        if embedding is not None:
            if self.context is None:
                raise RecipeError("model.embedding is given without model.context; there is nothing to embed")
            with at("model.embedding"):
                self.embedding = embedding((self.context_features,))
            self.context_features = features_of(self.embedding, (self.context_features,))
        keys = [*self.observation.in_keys, *(self.context.in_keys if self.context is not None else ())]
        self.window_keys = list(dict.fromkeys(keys))
        states = ["context_state"] if self.state_features else []
        self.in_keys, self.out_keys = [*self.window_keys, *states], [*self.choices, *states]

    @property
    def state_features(self) -> int:
        """Features of the state that the context source carries, 0 for none."""
        return self.context.state_features if self.context is not None else 0

    @property
    def told(self) -> bool:
        """Whether it has to be told the task."""
        return self.context is not None and self.context.told

    @abstractmethod
    def act(self, step: Window, state: State) -> tuple[dict[str, Tensor], State]:
        """What it chooses for one step `[num_envs, ...]`, by name, and the state after it."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        chosen, state = self.act(tensordict, tensordict.get("context_state", None))
        for key, value in chosen.items():
            tensordict.set(key, value)
        return tensordict if state is None else tensordict.set("context_state", state)

    def encode(self, window: Window, state: State, role: Role = "decide") -> tuple[Tensor, Contexts, State]:
        """What the networks are given of a window: x `[num_envs, time, features]`, contexts, and the state after.

        Args:
            window: entries `[num_envs, time, ...]`.
            state: of the context source before it, `[num_envs, state_features]`; None means fresh.
            role: what the contexts are for.
        """
        x = cast(Tensor, self.observation(window))
        return x, *self.contexts(window, x, state, role)

    def encode_step(self, step: Window, state: State) -> tuple[Tensor, Contexts, State]:
        """`encode` for one step `[num_envs, ...]`: x `[num_envs, features]` and contexts `[num_envs]`."""
        x = cast(Tensor, self.observation(step))
        if self.context is None:
            return x, Contexts(x[..., :0]), None
        window = {key: step[key].unsqueeze(1) for key in self.context.in_keys}
        contexts, state = self.contexts(window, x.unsqueeze(1), state)
        return x, contexts.flat(), state

    def contexts(self, window: Window, x: Tensor, state: State, role: Role = "decide") -> tuple[Contexts, State]:
        """Contexts of a window whose observations are encoded already, and the state after it."""
        if self.context is None:
            return Contexts(x[..., :0]), None
        entries = {key: window[key] for key in self.context.in_keys}
        contexts, state = self.context({**entries, FEATURES: x if self.trains_encoder else x.detach()}, state, role)
        return contexts if self.embedding is None else contexts.map(self.embedding), state

    def update_statistics(self, window: Window) -> None:
        """Take a collected batch into the running statistics."""
        self.observation.update_statistics(window)
        if self.context is not None:
            self.context.update_statistics(window)


def uses_context(network: nn.Module) -> bool:
    """Whether a network f(x | c) depends on c; one that does not say is taken to."""
    return bool(getattr(network, "uses_context", True))
