"""What TD3 and SAC share is what the formulas say: targets, weights, contexts, windows, encoders, continuation."""

import copy
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.algorithms import SAC, TD3
from lightning_hyper.algorithms.off_policy import target_of
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Replay
from lightning_hyper.experience.replay_buffer import CompactReplayBuffer
from lightning_hyper.modules import (
    ConstantContext,
    Contexts,
    ContextSource,
    JoinedContext,
    OneHotContext,
    RecurrentContext,
    ReturnScale,
    TaskContext,
)
from lightning_hyper.modules.critic import frozen
from lightning_hyper.nn import GRU, MLP, Concat, ConvEncoder, Hyper, VectorEncoder

BOTH = pytest.mark.parametrize("cls", [TD3, SAC])
MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=4), observation_embedding=3)


def changed(before, after):
    return {name for name, p in after.named_parameters() if not torch.equal(p, dict(before.named_parameters())[name])}


# --- Losses ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("context", ["state", "action", "constant"])
def test_a_policy_step_has_the_same_gradient_with_frozen_critics(cls, context, built, drawn):
    model = built(cls, critic="hyper", critic_context=[context])
    ready = model.preprocess(drawn())

    def gradient():
        torch.manual_seed(3)
        return torch.autograd.grad(model.actor_loss(ready)[0], list(model.agent.actor.parameters()))

    free = gradient()
    with frozen(model.critics):
        held = gradient()
    for a, b in zip(free, held, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@BOTH
@pytest.mark.parametrize(("context", "graph"), [("state", False), ("action", True)])
def test_a_policy_step_keeps_a_graph_of_the_trunk_only_where_the_trunk_sees_actions(
    cls, context, graph, built, drawn, given
):
    options = {"policy_delay": 1} if cls is TD3 else {}
    model = built(cls, critic="hyper", critic_context=[context], **options)
    kept = []
    model.critics.first.trunk.register_forward_hook(lambda _, inputs, z: kept.append(z.requires_grad))
    model.learn(given([drawn()]))
    assert kept == [True, graph]  # the critics' step, then the policy's
    assert all(p.requires_grad for p in model.critics.parameters())
    assert all(p.grad is None for p in model.critics.parameters())


@BOTH
def test_targets_add_up_n_rewards_bootstrap_after_truncation_and_not_after_termination(cls, built):
    gamma, n_step, length = 0.8, 3, 9
    model = built(cls, gamma=gamma, critic="hyper")
    done, terminated = torch.zeros(2, length, 1, dtype=torch.bool), torch.zeros(2, length, 1, dtype=torch.bool)
    done[0, 4], done[1, 5] = True, True
    terminated[1, 5] = True  # environment 0 is truncated, environment 1 terminates
    batch = TensorDict(
        {
            "observation": torch.randn(2, length, 3),
            "action": torch.rand(2, length, 2),
            "next": {
                "observation": torch.randn(2, length, 3), "reward": torch.randn(2, length, 1), "done": done,
                "terminated": terminated,
            },
        },
        batch_size=[2, length],
    )  # fmt: skip
    fresh, carried = batch["observation"][:, 1:], batch["next", "observation"][:, :-1]
    batch["observation"][:, 1:] = torch.where(done[:, :-1], fresh, carried)
    buffer = CompactReplayBuffer(2 * length, 2, {"observation": torch.zeros(3)}, torch.zeros(2), n_step=n_step)
    buffer.extend(batch)
    torch.manual_seed(4)
    (block,) = buffer.blocks(1, 300)
    minibatch = model.preprocess(block)
    place = (minibatch["observation"][:, None, None] == batch["observation"]).all(-1).nonzero()
    assert place[:, 0].equal(torch.arange(300))
    last, total, powers = [], torch.zeros(300), []
    for k, (n, t) in enumerate(place[:, 1:].tolist()):
        for j in range(n_step):
            total[k] += gamma**j * batch["next", "reward"][n, t + j, 0]
            if done[n, t + j] or t + j == length - 1:
                break
        last.append((n, t + j))
        powers.append(0.0 if terminated[n, t + j] else gamma ** (j + 1))
    assert {0.0, gamma, gamma**2, gamma**3} == set(powers)
    after = torch.stack([batch["next", "observation"][n, t] for n, t in last])
    with torch.no_grad():
        torch.manual_seed(5)
        value = value_after(model, after)
        target = total + torch.tensor(powers) * value
        action = batch["action"][place[:, 1], place[:, 2]]
        scaled = 2 * (action - torch.tensor([-2.0, 1.0])) / torch.tensor([3.0, 4.0]) - 1
        first = model.critics.value(minibatch, scaled)
    torch.manual_seed(5)
    _, _, error = model.critic_loss(minibatch)
    torch.testing.assert_close(error, (first - target).abs(), atol=1e-5, rtol=1e-5)


def value_after(model, observation, context=None):
    """min(Q1', Q2')(s', a') of observations `[B, 3]`, less alpha log pi where there is one, by the formulas."""
    c = observation[:, :0] if context is None else context
    if isinstance(model, TD3):
        action = torch.tanh(model.target_actor(observation, c))
        action = (action + (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)).clamp(-1, 1)
        log_prob = torch.zeros(len(observation))
    else:
        mean, log_std = model.agent.actor(observation, c).chunk(2, -1)
        noise = torch.randn_like(mean)
        action = torch.tanh(mean + log_std.exp() * noise)
        normal = torch.distributions.Normal(mean, log_std.exp())
        log_prob = (normal.log_prob(mean + log_std.exp() * noise) - (1 - action.square()).log()).sum(-1)
    x = action if context is None else torch.cat([action, context], -1)
    values = [net(x, observation)[:, 0] for net in (model.target_critics.first, model.target_critics.second)]
    return torch.minimum(*values) - (0.0 if isinstance(model, TD3) else model.log_alpha.exp()) * log_prob


@BOTH
def test_weights_of_a_prioritised_sample_weigh_its_squared_errors(cls, built, drawn, given, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    minibatch, weight = drawn(), torch.tensor([2.0] * 16 + [0.0] * 16)
    model, expected = built(cls, critic="hyper"), built(cls, critic="hyper")
    sample = given([{**minibatch, "index": torch.arange(32), "weight": weight}])
    model.learn(sample)
    expected.learn(given([{key: entry[:16] for key, entry in minibatch.items()}]))
    for a, b in zip(model.critics.parameters(), expected.critics.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    ((index, error),) = sample.priorities
    assert index.equal(torch.arange(32))
    assert error.shape == (32,)
    assert not error.requires_grad
    assert (error >= 0).all()


def test_many_minibatches_of_a_block_are_learned_from_one_after_the_other(built, drawn, given):
    model, other = built(TD3), built(TD3)
    parts = [drawn() for _ in range(5)]
    block = given([{key: torch.cat([part[key] for part in parts]) for key in parts[0]}])
    block.batch_size = 32
    torch.manual_seed(2)
    first = model.learn(given(parts))
    torch.manual_seed(2)
    second = other.learn(block)
    assert [update["critic"] for update in first] == [update["critic"] for update in second]
    assert not changed(model, other)


# --- Statistics -----------------------------------------------------------------------------------------------------


def test_observations_are_standardised_by_what_was_collected_before_the_updates(built, drawn, given):
    model = built(TD3, critic="hyper", normalize_observation=True)
    batch = given([drawn()])
    batch.collected["observation"].mul_(3).add_(2)
    model.learn(batch)
    rows = batch.collected["observation"].flatten(0, 1).double()
    x, action = torch.randn(8, 3), torch.randn(8, 2)
    z = ((x - rows.mean(0)) / rows.std(0, unbiased=False)).float()
    for critics in (model.critics, model.target_critics):
        expected = critics.first(action, z)[:, 0]
        torch.testing.assert_close(critics.value({"observation": x}, action), expected, atol=1e-4, rtol=1e-4)
    for observation in (model.agent.observation, model.target_observation):
        torch.testing.assert_close(observation({"observation": x}), z, atol=1e-5, rtol=1e-4)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return_where_that_is_asked_for(built, drawn, given):
    model, plain = built(SAC, normalize_reward=True, gamma=0.9), built(SAC, gamma=0.9)
    scale = ReturnScale(0.9)
    for _ in range(2):
        batch = given([drawn()])
        batch.collected["next", "reward"].normal_(0, 30)
        batch.collected["next", "done"][0, 2] = True
        scale.take_in(batch.collected["next", "reward"], batch.collected["next", "done"])
        model.learn(batch)
    sample = drawn(n_step=3)
    expected = plain.preprocess({**sample, "reward": sample["reward"] / scale.variance.sqrt().float()})
    torch.testing.assert_close(model.preprocess(sample)["reward"], expected["reward"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain.preprocess(sample)["reward"], sample["reward"] @ torch.tensor([1, 0.9, 0.81]))


# --- Contexts -------------------------------------------------------------------------------------------------------


def trained(cls, env, *, batches=6, sequence=1, seed=0, **options):
    """A model and its experience after some batches, without a trainer."""
    torch.manual_seed(seed)
    data = Replay(env, steps=4, capacity=64, batch_size=8, sequence=sequence, warmup_frames=16, updates_per_frame=0.5)
    data.connect(seed=seed)
    model = cls(**{"actor": partial(Concat, hidden=[6]), "critic": partial(Concat, hidden=[6]), **options})
    model.build(Spaces.of(data.env))
    data.begin(model.policy)
    return model, data, [model.learn(data.collect()) for _ in range(batches)]


@BOTH
@pytest.mark.parametrize(
    ("context", "indexed", "sequence"),
    [
        (TaskContext, False, 1),
        (OneHotContext, True, 1),
        (partial(OneHotContext, outputs=4), True, 1),
        (partial(ConstantContext, size=2), False, 1),
        ([TaskContext, ConstantContext], False, 1),
        (MEMORY, False, 4),
        (partial(MEMORY, first_step="zero", encoded=True), True, 4),
        (partial(JoinedContext, parts=[TaskContext, MEMORY]), False, 4),
    ],
)
@pytest.mark.parametrize("critic_context", [["state"], ["task"], ["action", "task", "constant"]])
@pytest.mark.parametrize("network", [Concat, Hyper])
def test_every_context_source_trains(cls, context, indexed, sequence, critic_context, network, tasks):
    env, networks = partial(tasks, indexed=indexed), partial(network, hidden=[6])
    parts = {"context": context, "critic_context": critic_context, "actor": networks, "critic": networks}
    parts["embedding"] = partial(VectorEncoder, widths=[5])
    before, _, _ = trained(cls, env, sequence=sequence, batches=0, **parts)
    model, _, measured = trained(cls, env, sequence=sequence, **parts)
    assert sum(map(len, measured)) == 16
    assert all(value.isfinite() for batch in measured for update in batch for value in update.values())
    assert model.agent.embedding.out_features == model.agent.context_features == 5
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned - changed(before, model) == set()
    grouped = {id(p) for group in model.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def parameters(module):
    return list(module.parameters())


@BOTH
def test_the_source_learns_from_the_critics_and_each_encoder_from_its_own_loss(cls, tasks):
    encoder = partial(VectorEncoder, widths=[4])
    model, data, _ = trained(cls, tasks, context=partial(MEMORY, encoded=True), encoder=encoder, sequence=3)
    (block,) = data.buffer.blocks(1, 8)
    minibatch = model.preprocess(block)
    agent, critics = model.agent, model.critics
    source = parameters(agent.context)
    for loss, moves, stays in (
        (model.critic_loss(minibatch)[0], [critics, agent.context], [agent.observation, agent.actor]),
        (model.actor_loss(minibatch)[0], [agent.observation, agent.actor], [agent.context]),
    ):
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None for part in moves for p in part.parameters())
        assert all(p.grad is None for part in stays for p in part.parameters())
    critic_group = next(group for group in model.parameter_groups() if group["name"] == "critic")
    assert {id(p) for p in source} <= {id(p) for p in critic_group["params"]}


class Seen(ContextSource):
    """A user's own source, whose contexts change from step to step."""

    in_keys, out_features = ("observation",), 3

    def __init__(self, spaces, features):
        super().__init__()

    def forward(self, window, state, role="decide"):
        return Contexts(window["observation"] ** 2), None


@BOTH
def test_what_follows_a_frame_has_a_context_of_its_own(cls, built, drawn):
    model, minibatch = built(cls, context=Seen), drawn()
    ready, after = model.preprocess(minibatch), minibatch["next_observation"]
    x = torch.cat([ready["action"], minibatch["observation"] ** 2], -1)
    with torch.no_grad():
        torch.manual_seed(5)
        target = ready["reward"] + ready["discount"] * value_after(model, after, after**2)
        torch.manual_seed(5)
        _, _, error = model.critic_loss(ready)
        value = model.critics.first(x, minibatch["observation"])[:, 0]
    torch.testing.assert_close(error, (value - target).abs(), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("first_step", ["observation", "zero"])
def test_errors_of_windows_equal_those_of_frames_whose_memory_is_carried_step_by_step(cls, first_step, tasks):
    context = partial(MEMORY, first_step=first_step)
    model, data, _ = trained(cls, partial(tasks, num_envs=3), context=context, sequence=5, batches=0)
    frames = [data.collect().collected for _ in range(5)]
    batch = {key: torch.cat([part[key] for part in frames], 1) for key in (*model.agent.window_keys, "action")}
    batch["state"] = torch.cat([part["context_state"] for part in frames], 1)
    after = {key: torch.cat([part["next", key] for part in frames], 1) for key in model.agent.window_keys}
    after |= {key: torch.cat([part["next", key] for part in frames], 1) for key in ("reward", "done", "terminated")}
    with torch.no_grad():
        for target in (model.target_critics, getattr(model, "target_actor", model.target_critics)):
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    (block,) = data.buffer.blocks(1, 24)
    minibatch, source = model.preprocess(block), model.agent.context
    expected = torch.zeros(24, 5)

    def step(entries, n, t, state):
        window = {key: entries[key][n : n + 1, t : t + 1] for key in model.agent.window_keys}
        contexts, state = source({**window, "features": window["observation"]}, state)
        return window["observation"][0], contexts.each()[0], state

    ends = 0
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
        for k in range(24):
            ((n, t),) = (batch["observation"] == block["window_observation"][k, 0]).all(-1).nonzero().tolist()
            state = batch["state"][n : n + 1, t]
            for j in range(5):
                s, c, state = step(batch, n, t + j, state)
                s_next, c_next, _ = step(after, n, t + j, state)
                reward, over = after["reward"][n, t + j], after["terminated"][n, t + j]
                target = reward + model.gamma * ~over * value_after(model, s_next, c_next)
                scaled = batch["action"][n, t + j].unsqueeze(0) / 2
                value = model.critics.first(torch.cat([scaled, c], -1), s)[0]
                expected[k, j] = (value - target).abs()
                ends += int(after["done"][n, t + j])
        _, _, error = model.critic_loss(minibatch)
    assert ends > 24
    torch.testing.assert_close(error, expected, atol=1e-5, rtol=1e-4)


@BOTH
def test_images_go_through_encoders_of_which_the_targets_follow(cls):
    shape = (1, 36, 36)
    spaces = Spaces(observation=shape, actions=2, discrete=False, low=(-1.0, -1.0), high=(1.0, 1.0))
    options = {"policy_delay": 1} if cls is TD3 else {}
    model = cls(encoder=partial(ConvEncoder, features=5), critic=partial(Concat, hidden=[6]), tau=0.25, **options)
    model.build(spaces)
    before = copy.deepcopy(model)
    minibatch = model.preprocess(
        {
            "observation": torch.randint(255, (8, *shape), dtype=torch.uint8),
            "next_observation": torch.randint(255, (8, *shape), dtype=torch.uint8),
            "action": torch.rand(8, 2), "reward": torch.randn(8, 1), "steps": torch.ones(8, dtype=torch.int64),
            "terminated": torch.zeros(8, dtype=torch.bool),
        }
    )  # fmt: skip
    model.learn_minibatch(minibatch)
    pairs = [(model.critics, model.target_critics, before.target_critics)]
    if cls is TD3:
        pairs.append((model.agent.observation, model.target_observation, before.target_observation))
    for network, target, was in pairs:
        for a, b, c in zip(network.parameters(), target.parameters(), was.parameters(), strict=True):
            assert not torch.equal(a, c)
            torch.testing.assert_close(b, c + 0.25 * (a - c))
    assert model.agent.observation.encoder is not model.critics.observation.encoder


def test_a_target_shares_statistics_and_nothing_else(tasks):
    model, _, _ = trained(TD3, tasks, normalize_observation=True, batches=0)
    target = target_of(model.critics)
    assert target.observation.norm is model.critics.observation.norm is model.agent.observation.norm
    assert not {id(p) for p in target.parameters()} & {id(p) for p in model.critics.parameters()}
    assert not any(p.requires_grad for p in target.parameters())


# --- Defaults, continuation, options --------------------------------------------------------------------------------


@BOTH
def test_without_any_option_it_learns_with_two_layers_of_256_units(cls, tasks):
    torch.manual_seed(0)
    data, model = Replay(tasks, warmup_frames=50, batch_size=16), cls()
    data.connect()
    model.build(Spaces.of(data.env))
    data.begin(model.policy)
    for network in (model.agent.actor, model.critics.first, model.critics.second):
        widths = [layer.out_features for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        assert widths[:-1] == [256, 256]
        assert isinstance(network.activation, torch.nn.ReLU)
    measured = [model.learn(data.collect()) for _ in range(400)]
    errors = [float(update["critic"]) for batch in measured for update in batch]
    assert sum(errors[-100:]) < 0.5 * sum(errors[:100])


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"context": MEMORY}, {"context": TaskContext}], ids=["plain", "memory", "task"]
)
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(cls, options, tasks, tmp_path):
    options |= {"normalize_reward": True, "normalize_observation": True}
    make = partial(trained, cls, tasks, sequence=3 if options.get("context") is MEMORY else 1, **options)
    model, data, _ = make(batches=7)
    kept = copy.deepcopy([model.state_dict(), model.optimizer.state_dict(), model.save_state(), data.save_state()])
    data.save_buffer(tmp_path)
    other, again, _ = make(batches=0, seed=5)
    other.load_state_dict(kept[0]), other.optimizer.load_state_dict(kept[1]), other.load_state(kept[2])
    again.load_state(kept[3]), again.load_buffer(tmp_path)
    torch.manual_seed(4)
    expected = [model.learn(data.collect()) for _ in range(5)]
    torch.manual_seed(4)
    found = [other.learn(again.collect()) for _ in range(5)]
    assert expected == found
    assert sum(map(len, found)) == 20
    assert not changed(model, other)


@BOTH
def test_losses_may_be_compiled(cls, built, drawn, given, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    model = built(cls, compile=True)
    assert compiled == ["critic_loss", "actor_loss"]
    model.learn(given([drawn()]))


@BOTH
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"actor_lr": 0.0}, r"\.actor_lr is 0"),
        ({"critic_lr": -1.0}, r"\.critic_lr is -1"),
        ({"gamma": 1.5}, r"\.gamma is 1.5"),
        ({"gamma": -0.1}, r"\.gamma is -0.1"),
        ({"tau": 2.0}, r"\.tau is 2"),
        ({"critic_context": ["XY"]}, r"critic_context is \['XY'\]; it must be a list, each one of state, action"),
        ({"critic_context": ["task"]}, "model.critic_context names task, but there is no model.context"),
        ({"shared_trunk": True}, "model.shared_trunk"),
        ({"critic": MLP}, "model.critic: MLP as it is set ignores its context"),
        ({"spaces": Spaces(observation=(3,), actions=4, discrete=True)}, "discrete actions"),
        ({"spaces": Spaces(observation=(3,), actions=2, discrete=False)}, "unbounded actions"),
        ({"context": TaskContext}, "TaskContext needs a task"),
    ],
)
def test_impossible_options_name_the_key(cls, options, key, built):
    with pytest.raises(ValueError, match=key):
        built(cls, **options)
