"""What an episodic memory may and may not change in PPO, against loops over single steps and entries."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_hyper.algorithms import PPO, RetrievalPPO
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Pendulum, Trials
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Rollouts
from lightning_hyper.memory import EpisodicMemory, Newest, TaskQuota, Uniform
from lightning_hyper.modules import OneHotContext, RecurrentContext, TaskContext, TextContext
from lightning_hyper.modules.retriever import AttentionRetriever, NearestRetriever
from lightning_hyper.nn import GRU, MLP, Concat, GridEncoder, Hyper
from lightning_hyper.objectives import DynamicAlpha, FixedAlpha, PPOLoss

CARTPOLE = partial(Gym, "CartPole-v1", num_envs=4, arguments={"max_episode_steps": 11})
MINIGRID = partial(MiniGrid, num_envs=4, tasks=["MiniGrid-LavaGapS5-v0", "MiniGrid-Empty-5x5-v0"], levels=8)
MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=6), code=2)
TASK = partial(OneHotContext, outputs=3, role=True)
LAYER = partial(Hyper, hidden=[])
OWN = {"tasks": "own"}
IMAGES = {"env": MINIGRID, "encoder": partial(GridEncoder, channels=(4, 4, 6))}


def learner(env=CARTPOLE, kind=RetrievalPPO, *, retriever=None, capacity=12, rule=Newest, recentre=False, **options):
    """The algorithm with rather large random weights, and experience that is ready to collect."""
    data = Rollouts(env, steps=12)
    data.connect(seed=4)
    memory = EpisodicMemory(capacity=capacity, rule=rule(), recentre=recentre)
    if kind is RetrievalPPO:
        retriever = retriever or {}
        options |= {"retriever": partial(AttentionRetriever, **{"subset": None, **retriever}), "memory": memory}
    heads = {"actor": partial(Concat, hidden=[5]), "critic": partial(Concat, hidden=[5])}
    loss = PPOLoss(entropy=0.02, value=0.7)
    model = kind(**{**heads, "loss": loss, "lr": 1e-3, "epochs": 2, "minibatches": 2, **options})
    torch.manual_seed(1)
    model.build(Spaces.of(data.env))
    model.check(data.env.batch_size.numel(), 12)
    torch.manual_seed(1)  # the same weights with a memory and without
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    data.begin(model.policy)
    return model, data


def with_ends(batch):
    """Episodes of images that end early in a batch, some by termination."""
    if batch["observation"].ndim > 3:
        batch["next", "done"][:, 5] = True
        batch["next", "terminated"][:2, 5] = True
        batch["next", "reward"][:, 5] = torch.rand(len(batch["next", "reward"]), 1)
        batch["step_count"] = torch.arange(12).view(1, 12, 1).expand_as(batch["step_count"]) % 6
    return batch


def remembering(model, data, batches=3):
    """Experience without learning, until the memory is full; the last batch and what it is compared with."""
    for _ in range(batches):
        batch = with_ends(data.collect())
        model.memory.insert(model.recorder.completed(batch))
    assert len(model.memory) == model.memory.capacity
    entries = {key: batch[key] for key in model.agent.window_keys} | model.estimate(batch)
    if model.agent.state_features:
        entries["context_state"] = batch["context_state"][:, 0]
    return batch, entries


def by_hand(model, part, alpha_of):
    """Total loss and memory's values of a minibatch, one step and one entry at a time."""
    agent, memory, own = model.agent, model.memory, model.retriever.tasks == "own"
    network = model.retriever.projection if model.retriever.projection is not None else agent.decision

    def projected(x, c):
        return x if network is None else network(x.unsqueeze(0), c.unsqueeze(0))[0]

    keys, values = [], []
    for k in range(memory.capacity):
        entry = memory.at(torch.tensor([k]))
        window = {key: entry[key].unsqueeze(1) for key in agent.window_keys}
        x, contexts, _ = agent.encode(window, entry["context_state"] if agent.state_features else None, "retrieve")
        keys.append((projected(x[0, 0], contexts.each()[0, 0]), entry["task"][0] if own else None))
        values.append(entry["value"][0])
    seen = {role: agent.encode(part, part.get("context_state"), role)[:2] for role in ("decide", "retrieve")}
    x = seen["decide"][0].flatten(0, 1)
    decide, retrieve = (contexts.each().flatten(0, 1) for _, contexts in seen.values())
    rows = part.get("rows", torch.arange(len(x)))
    losses, recalled, confidences = [], [], []
    for row in rows.tolist():
        query = projected(x[row], retrieve[row])
        allowed = [k for k, (_, task) in enumerate(keys) if not own or task == part["task"].flatten()[row]]
        scores = {k: query @ keys[k][0] for k in allowed}
        largest = max((score.detach() for score in scores.values()), default=0.0)
        scores = {k: (score - largest).exp() for k, score in scores.items()}
        weights = {k: score / sum(scores.values()) for k, score in scores.items()}
        remembered = sum((w * values[k] for k, w in weights.items()), torch.zeros(()))
        confidence = max(weights.values(), default=torch.zeros(()))
        alpha = alpha_of(confidence) if allowed else torch.zeros(())
        decided, c = x[row : row + 1], decide[row : row + 1]
        decided = decided if agent.decision is None else agent.decision(decided, c)
        log_p, value = agent.actor(decided, c)[0].log_softmax(-1), agent.critic(decided, c)[0, 0]
        target = {key: part[key].flatten(0, 1)[row] for key in ("action", "log_prob", "target")}
        ratio = (log_p[target["action"]] - target["log_prob"]).exp()
        advantage = part["advantage"].flatten()[row]
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        error = (1 - alpha) * (value - target["target"]) ** 2 + alpha * (value - remembered) ** 2
        losses.append(-surrogate + 0.7 * 0.5 * error + 0.02 * (log_p.exp() * log_p).sum())
        recalled.append(remembered)
        confidences.append(confidence)
    return torch.stack(losses).mean(), torch.stack(recalled), torch.stack(confidences)


CASES = {
    "nothing but the encoding": {},
    "a projection, memory": {"context": MEMORY, "retriever": {"projection": LAYER}},
    "a projection, memory, steps": {"context": MEMORY, "partition": "steps", "retriever": {"projection": LAYER}},
    "decision": {**IMAGES, "context": partial(TASK, role=False), "decision": LAYER},
    "decision, roles": {**IMAGES, "context": TASK, "decision": LAYER},
    "decision, roles and texts": {**IMAGES, "context": [TASK, TextContext], "decision": LAYER},
    "decision, own tasks": {**IMAGES, "context": TASK, "decision": LAYER, "retriever": OWN, "rule": Uniform},
    "decision, own tasks of which one is unknown": {**IMAGES, "context": TASK, "decision": LAYER, "retriever": OWN},
    "decision and a projection": {**IMAGES, "context": TASK, "decision": LAYER, "retriever": {"projection": LAYER}},
    "a blind projection": {**IMAGES, "context": TASK, "retriever": {"projection": partial(MLP, hidden=[])}},
    "decision, roles, memory": {**IMAGES, "context": [TASK, MEMORY], "decision": LAYER},
    "fixed alpha": {**IMAGES, "context": TASK, "decision": LAYER, "alpha": FixedAlpha(value=0.6)},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_a_loop_over_steps_and_entries(name):
    model, data = learner(**CASES[name], normalize_advantage=None)
    _, entries = remembering(model, data)
    part = next(iter(model.minibatched(entries)))
    fixed = name == "fixed alpha"
    total, recalled, confidence = by_hand(
        model, part, lambda found: torch.tensor(0.6) if fixed else found.clamp(min=0.1)
    )
    recall = model.recall(part)[2]
    torch.testing.assert_close(recall.value, recalled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(recall.confidence, confidence, atol=1e-5, rtol=1e-4)
    losses = model.losses(part)
    torch.testing.assert_close(losses["total"], total, atol=1e-5, rtol=1e-4)
    parameters = [p for module in (model.agent, model.retriever) for p in module.parameters()]
    got = torch.autograd.grad(losses["total"], parameters, allow_unused=True)
    want = torch.autograd.grad(total, parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    if "own" in name:
        assert len(model.memory.entries["task"].unique()) == (1 if "unknown" in name else 2)


@pytest.mark.parametrize("name", ["a projection, memory", "decision, roles, memory"])
def test_the_context_of_an_entry_is_that_of_the_time_when_it_was_collected(name):
    """Stepped through all batches from the first frame, contexts of the same observations are those of the memory."""
    model, data = learner(**{**CASES[name], "env": CARTPOLE} if name.startswith("a") else CASES[name], capacity=30)
    agent, state, seen = model.agent, None, {}
    part = agent.context.parts[1] if name.startswith("decision") else agent.context
    with torch.no_grad():
        for _ in range(4):
            batch = data.collect()
            with_ends(batch)
            model.memory.insert(model.recorder.completed(batch))
            for t in range(12):
                x = agent.observation({key: batch[key][:, t : t + 1] for key in agent.observation.in_keys})
                window = {key: batch[key][:, t : t + 1] for key in part.in_keys} | {"features": x}
                contexts, state = part(window, state)
                for row, context in enumerate(contexts.each()[:, 0]):
                    seen[batch["log_prob"][row, t].item(), batch["state_value"][row, t].item()] = context
    held = model.memory.at(model.memory.draw())
    assert held["context_state"].any(-1).sum() > 10
    window = {key: held[key].unsqueeze(1) for key in agent.window_keys}
    with torch.no_grad():
        made = agent.encode(window, held["context_state"], "retrieve")[1].each()[:, 0]
    known = torch.stack(list(seen.values()))
    for context in made[..., -known.shape[-1] :]:
        assert (known - context).abs().amax(-1).min() < 1e-5


def test_values_of_entries_are_discounted_rewards_and_what_follows_a_truncation():
    """Dense rewards, episodes over several batches, learning in between."""
    model, data = learner(capacity=500, gamma=0.9)
    rewards, episodes, kinds = [[] for _ in range(4)], [], set()
    for _ in range(5):
        batch = data.collect()
        model.learn(batch)
        after = batch["next"]
        completed = []
        for row in range(4):
            for t in range(12):
                rewards[row].append((batch["observation"][row, t], after["reward"][row, t].item()))
                if after["done"][row, t]:
                    value = 0.0 if after["terminated"][row, t] else batch["next_value"][row, t].item()
                    kinds.add(bool(after["terminated"][row, t]))
                    worth = []
                    for observation, reward in reversed(rewards[row]):
                        value = reward + 0.9 * value
                        worth.append((observation, value, len(rewards[row])))
                    completed += reversed(worth)
                    rewards[row] = []
        episodes.append(completed)
    held = model.memory.at(model.memory.draw())
    expected = [step for completed in episodes for step in completed]
    assert kinds == {True, False}
    assert len(held) == len(expected) > 100
    for entry, (observation, value, length) in zip(held, expected, strict=True):
        assert torch.equal(entry["observation"], observation)
        assert entry["value"].item() == pytest.approx(value, rel=1e-4)
        assert entry["episode_return"].item() == length  # CartPole gives 1 a frame


def test_time_limits_that_are_ends_are_so_for_the_memory_too():
    env = partial(Gym, "CartPole-v1", num_envs=4, arguments={"max_episode_steps": 3})
    for bootstrap in (True, False):
        model, data = learner(env, gamma=0.5, bootstrap_truncation=bootstrap)
        batch = data.collect()
        model.memory.insert(model.recorder.completed(batch))
        last = model.memory.at(model.memory.draw())["value"].view(-1, 3)[-1]
        value = batch["next_value"][-1, -1].item() * bootstrap
        assert last.tolist() == pytest.approx([1.75 + value / 8, 1.5 + value / 4, 1 + value / 2], rel=1e-4)


def test_values_of_entries_have_the_unit_of_the_critics_targets():
    model, data = learner(partial(Pendulum, num_envs=4, episode_steps=6), normalize_reward=True, gae_lambda=1.0)
    batch = data.collect()
    seen = []
    model.improve = lambda scaled: seen.append(scaled) or type(model).improve(model, scaled)
    model.learn(batch)
    targets = model.estimate(seen[0])["target"]
    entries = model.memory.at(model.memory.draw())
    # With lambda 1 both are the discounted rewards and the value of the last observation.
    for value in entries["value"]:
        assert (targets - value).abs().min() < 1e-3


def trained(make, batches=3):
    model, data = make()
    torch.manual_seed(7)
    for _ in range(batches):
        batch = with_ends(data.collect())
        model.learn(batch)
    return model, batch


@pytest.mark.parametrize("name", ["nothing but the encoding", "a projection, memory", "decision, roles"])
def test_a_memory_that_counts_for_nothing_changes_nothing(name):
    """Alpha 0: acting, advantages and every update are those of plain PPO, so no draw of the memory is felt."""
    options = dict(CASES[name])
    retriever = {"subset": 5, **options.pop("retriever", {})}
    ours, remembered = trained(partial(learner, **options, retriever=retriever, alpha=FixedAlpha(value=0.0)))
    plain, batch = trained(partial(learner, **options, kind=PPO))
    assert len(ours.memory) == 12
    assert torch.equal(batch["action"], remembered["action"])
    for key, value in plain.agent.state_dict().items():
        torch.testing.assert_close(value, ours.agent.state_dict()[key], atol=1e-5, rtol=1e-4)


def test_a_memory_that_counts_changes_the_value_loss_alone():
    model, data = learner(**CASES["decision, roles"])
    batch, entries = remembering(model, data)
    part = next(iter(model.minibatched(entries)))
    with_memory = model.losses(part)
    model.memory.stamps.zero_()
    without = model.losses(part)
    for key in ("policy", "entropy", "kl", "clipped"):
        torch.testing.assert_close(with_memory[key], without[key])
    assert not torch.allclose(with_memory["value"], without["value"])
    assert 0.1 <= with_memory["alpha"] <= 1
    after = model.estimate(batch)
    assert all(torch.equal(entries[key], after[key]) for key in after)


def test_an_empty_memory_says_nothing_and_every_parameter_has_a_gradient():
    model, data = learner(retriever={"projection": LAYER}, context=MEMORY)
    batch = data.collect()
    batch["next", "done"][:] = batch["next", "terminated"][:] = False
    first = model.learn(batch)[0]
    assert first["memory_size"] == 0
    assert "alpha" not in first
    assert all(p.grad is not None and not p.grad.any() for p in model.retriever.parameters())


@pytest.mark.parametrize("name", ["a projection, memory", "decision, roles", "decision and a projection"])
def test_keys_that_are_kept_for_one_call_equal_fresh_ones(name):
    options = dict(CASES[name])
    retriever = options.pop("retriever", {})
    recalls = []
    for refresh in (None, 1):
        model, data = learner(**options, retriever={**retriever, "refresh": refresh})
        _, entries = remembering(model, data)
        torch.manual_seed(3)
        part = next(iter(model.minibatched(entries)))
        recalls.append(model.recall(part)[2])
        torch.testing.assert_close(*[model.losses(part)["total"]] * 2)
    fresh, kept = recalls
    torch.testing.assert_close(fresh.weights, kept.weights, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fresh.value, kept.value, atol=1e-5, rtol=1e-4)


def test_kept_keys_are_those_of_older_weights_until_they_are_due():
    model, data = learner(context=MEMORY, retriever={"projection": LAYER, "refresh": 2})
    _, entries = remembering(model, data)
    part = next(iter(model.minibatched(entries)))

    def weights(of):
        with torch.no_grad():
            return of.recall(part)[2].weights

    weights(model)  # the first call
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fresh = copy.deepcopy(model)
    fresh.cache.refresh, fresh.cache.calls = 1, 0
    assert not torch.allclose(weights(model), weights(fresh))  # the second: old keys
    torch.testing.assert_close(weights(model), weights(fresh))  # the third: all again


def test_a_subset_is_drawn_anew_for_each_update():
    model, data = learner(retriever={"subset": 5})
    _, entries = remembering(model, data)
    part = next(iter(model.minibatched(entries)))
    drawn = [model.recall(part)[2].places for _ in range(2)]
    assert [len(places.unique()) for places in drawn] == [5, 5]
    assert not torch.equal(drawn[0].sort().values, drawn[1].sort().values)
    places = torch.tensor([7, 1])
    assert torch.equal(model.recall(part, places)[2].places, places)


@pytest.mark.parametrize("name", ["a projection, memory", "decision, roles, memory"])
def test_a_restored_memory_gives_the_same_updates(name):
    options = dict(CASES[name])
    options["retriever"] = {**options.get("retriever", {}), "refresh": 3, "subset": 5}
    make = partial(learner, **options, rule=Uniform, normalize_reward=True)
    model, data = make()
    batches = [with_ends(data.collect()) for _ in range(3)]
    for batch in batches[:2]:
        model.learn(batch)
    other, _ = make()
    other.load_state_dict(model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(model.optimizer.state_dict()))
    other.load_state(copy.deepcopy(model.save_state()))
    for each in (model, other):
        torch.manual_seed(3)
        each.learn(batches[2].clone())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("env", "options"),
    [
        (partial(Pendulum, num_envs=4, episode_steps=6), {}),
        (partial(Trials, partial(GridNavi, episode_steps=3), num_envs=4), {"context": [TaskContext, MEMORY]}),
        (CARTPOLE, {"context": MEMORY, "partition": "steps"}),
    ],
)
@pytest.mark.parametrize("kind", [AttentionRetriever, partial(NearestRetriever, k=3)])
def test_it_learns_in_every_world(env, options, kind):
    data = Rollouts(env, steps=12)
    data.connect()
    model = RetrievalPPO(retriever=kind, memory=EpisodicMemory(), alpha=DynamicAlpha(), **options)
    model.build(Spaces.of(data.env))
    data.begin(model.policy)
    for _ in range(2):
        measured = model.learn(data.collect())
    assert all(value.isfinite().all() for update in measured for value in update.values())
    assert measured[-1]["memory_size"] == 50
    assert measured[-1]["alpha"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retriever": {"subset": 13}}, r"model.memory.capacity is 12, below the 13 entries of model.retriever.subset"),
        ({"retriever": {"projection": partial(MLP, hidden=[])}}, r"model.retriever.projection needs a context"),
        ({"retriever": OWN}, r"model.retriever.tasks is 'own', but data.env shows no tasks"),
        ({"rule": TaskQuota}, r"of data.env's indexed tasks, of which there are 0"),
        ({"decision": Hyper}, r"model.decision is given without model.context"),
        ({"minibatches": 7}, r"model.minibatches is 7, which does not divide the 48"),
    ],
)
def test_impossible_options_name_the_key(options, message):
    with pytest.raises(RecipeError, match=message):
        learner(**options)
