"""A replay buffer that stores every observation once gives what a list of all transitions gives."""

import math
import random
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from lightning_hyper.envs import EpisodeEnv
from lightning_hyper.experience.base import first_episodes
from lightning_hyper.experience.replay import Replay
from lightning_hyper.experience.replay_buffer import CompactReplayBuffer, ReplayBufferError

FEATURES, ACTIONS = 3, 2


class Stream:
    """Random episodes of `num_envs` environments in which no observation comes twice, and the list of all frames."""

    def __init__(self, num_envs, seed, ends=0.3):
        self.pick, self.ends, self.count = random.Random(seed), ends, 0
        self.now = [self.fresh() for _ in range(num_envs)]
        self.frames = [[] for _ in range(num_envs)]

    def fresh(self):
        self.count += 1
        return torch.tensor([float(self.count), self.pick.random(), self.pick.random()])

    def frame(self, env):
        kind = self.pick.random()
        terminated, truncated = kind < self.ends / 2, self.ends / 2 <= kind < self.ends
        frame = {
            "observation": self.now[env],
            "action": torch.tensor([self.pick.uniform(-2, 2) for _ in range(ACTIONS)]),
            "reward": self.pick.uniform(-1, 1),
            "next_observation": self.fresh(),
            "terminated": terminated,
            "done": terminated or truncated,
        }
        self.now[env] = self.fresh() if frame["done"] else frame["next_observation"]
        self.frames[env].append(frame)
        return frame

    def batch(self, steps):
        """A collected batch `[num_envs, steps]`, as a collector gives it."""
        rows = [[self.frame(env) for _ in range(steps)] for env in range(len(self.now))]

        def column(key):
            return torch.stack([torch.stack([torch.as_tensor(f[key]) for f in row]) for row in rows])

        after = {key: column(key).unsqueeze(-1) for key in ("reward", "terminated", "done")}
        return TensorDict(
            {
                "observation": column("observation"),
                "action": column("action"),
                "next": {"observation": column("next_observation"), **after},
            },
            batch_size=[len(self.now), steps],
        )

    def stored(self, capacity):
        """What must lie in a buffer: (environment, time) of the newest frames, by their observation's number."""
        kept = capacity // len(self.now)
        return {
            int(frames[t]["observation"][0]): (env, t)
            for env, frames in enumerate(self.frames)
            for t in range(max(0, len(frames) - kept), len(frames))
        }

    def sample(self, env, t, n_step):
        """The n-step transition that begins at a frame, from the definition."""
        frames, rewards = self.frames[env], []
        for frame in frames[t : t + n_step]:
            rewards.append(frame["reward"])
            if frame["done"]:
                break
        last = frames[t + len(rewards) - 1]
        return {
            "observation": frames[t]["observation"],
            "action": frames[t]["action"],
            "reward": torch.tensor(rewards + [0.0] * (n_step - len(rewards))),
            "steps": torch.tensor(len(rewards)),
            "next_observation": last["next_observation"],
            "terminated": torch.tensor(last["terminated"]),
        }


def row():
    return CompactReplayBuffer.row(torch.zeros(FEATURES), torch.zeros(ACTIONS))


def drawn(buffer, count, size=16):
    """Minibatches put together, by entry."""
    parts = list(buffer.minibatches(count, size, dict))
    assert len(parts) == count
    assert all(len(part["observation"]) == size for part in parts)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def assert_equals_the_list(buffer, stream, n_step, count=40):
    stored, sample = stream.stored(buffer.capacity), drawn(buffer, count)
    assert len(buffer) == len(stored)
    for k, number in enumerate(sample["observation"][:, 0].int().tolist()):
        for key, expected in stream.sample(*stored[number], n_step).items():
            assert torch.equal(sample[key][k], expected), (key, number)
    return set(sample["observation"][:, 0].int().tolist()), set(stored)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_every_sample_is_a_transition_of_the_newest_frames(seed, n_step, storage, tmp_path):
    pick = random.Random(seed)
    num_envs, kept = pick.randint(1, 4), pick.randint(3, 12)
    buffer = CompactReplayBuffer(
        num_envs * kept, num_envs, n_step=n_step, memmap=tmp_path if storage == "memmap" else None
    )
    stream = Stream(num_envs, seed, ends=(1.0, 0.0, 0.2, 0.6)[seed])
    written = 0
    while written < 25 * kept:  # wraps around 25 times
        steps = pick.randint(1, min(3, kept))
        buffer.extend(stream.batch(steps))
        written += steps
        assert_equals_the_list(buffer, stream, n_step, count=1)


@pytest.mark.parametrize("batches", [3, 11])
def test_uniform_samples_cover_all_stored_frames_evenly(batches):
    buffer, stream = CompactReplayBuffer(16, 2), Stream(2, 0)
    for _ in range(batches):
        buffer.extend(stream.batch(1))
    seen, stored = assert_equals_the_list(buffer, stream, 1)
    assert seen == stored
    counts = drawn(buffer, 1000)["observation"][:, 0].unique(return_counts=True)[1]
    assert (counts / counts.sum() * len(stored) - 1).abs().max() < 0.15


def test_capacity_is_rounded_up_to_whole_steps_and_a_batch_may_fill_it():
    buffer, stream = CompactReplayBuffer(10, 4), Stream(4, 0)
    assert buffer.capacity == 12
    for _ in range(5):
        buffer.extend(stream.batch(3))
        assert_equals_the_list(buffer, stream, 1)


def test_a_frame_takes_the_bytes_of_one_observation():
    buffer, stream = CompactReplayBuffer(64, 2), Stream(2, 0)
    buffer.extend(stream.batch(4))
    frame = FEATURES * 4 + ACTIONS * 4 + 4 + 1 + 4  # observation, action, reward, terminated, number of an end
    assert row().bytes() == frame
    assert buffer._frames.bytes() == frame * buffer.capacity


def test_observations_at_episodes_ends_are_forgotten_with_their_frames():
    buffer, stream = CompactReplayBuffer(40, 2), Stream(2, 0, ends=1.0)
    for _ in range(300):
        buffer.extend(stream.batch(1))
    assert len(buffer._ends._rows) <= 2 * (40 + 2)


# --- Prioritised sampling -------------------------------------------------------------------------------------------


@pytest.fixture
def prioritized():
    """A prioritised buffer whose frames have the error of their observation's number; the errors."""
    buffer, stream = CompactReplayBuffer(8, 2, prioritized=(0.6, 0.4), n_step=2), Stream(2, 0)
    for _ in range(7):
        buffer.extend(stream.batch(1))
    np.random.seed(0)
    stored = stream.stored(8)
    errors = {number: 0.1 + k for k, number in enumerate(stored)}
    for _ in range(40):
        (sample,) = buffer.minibatches(1, 8, dict)
        numbers = sample["observation"][:, 0].int().tolist()
        buffer.prioritize(sample["index"], torch.tensor([errors[n] for n in numbers]))
    return buffer, stream, errors


def test_prioritised_samples_follow_the_errors_to_alpha(prioritized):
    buffer, stream, errors = prioritized
    seen, stored = assert_equals_the_list(buffer, stream, 2)
    assert seen <= stored
    numbers = drawn(buffer, 2000)["observation"][:, 0].int()
    total = sum(error**0.6 for error in errors.values())
    for number, error in errors.items():
        assert (numbers == number).float().mean().item() == pytest.approx(error**0.6 / total, abs=0.01)


def test_weights_are_the_inverse_probabilities_to_beta_over_the_largest(prioritized):
    buffer, _, errors = prioritized
    sample = drawn(buffer, 50)
    expected = [(errors[int(n)] / min(errors.values())) ** (-0.6 * 0.4) for n in sample["observation"][:, 0]]
    torch.testing.assert_close(sample["weight"], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_new_frame_has_the_largest_priority(prioritized):
    buffer, stream, errors = prioritized
    buffer.extend(stream.batch(1))
    stored = stream.stored(8)
    priority = {n: errors.get(n, max(errors.values())) ** 0.6 for n in stored}
    numbers = drawn(buffer, 2000)["observation"][:, 0].int()
    for number in set(stored) - set(errors):
        share = priority[number] / sum(priority.values())
        assert (numbers == number).float().mean().item() == pytest.approx(share, abs=0.015)


# --- Saving and loading ---------------------------------------------------------------------------------------------


def assert_continues_identically(buffer, other, stream):
    for _ in range(12):
        batch = stream.batch(1)
        samples = []
        for each in (buffer, other):
            torch.manual_seed(5), np.random.seed(5)
            each.extend(batch)
            sample = drawn(each, 2)
            if "index" in sample:
                each.prioritize(sample["index"], sample["observation"][:, 0])
            samples.append(sample)
        for key, value in samples[0].items():
            assert torch.equal(value, samples[1][key]), key


@pytest.mark.parametrize("batches", [0, 1, 4, 9])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_loaded_buffer_continues_identically(batches, storage, tmp_path):
    def make():
        return CompactReplayBuffer(12, 3, n_step=2, memmap=tmp_path / "frames" if storage == "memmap" else None)

    (tmp_path / "frames").mkdir()
    stream, buffer = Stream(3, 0), make()
    for _ in range(batches):
        buffer.extend(stream.batch(1))
    buffer.save(tmp_path)
    if storage == "memmap":  # a continued run finds the files of the one before, so the two cannot live side by side
        buffer, given = CompactReplayBuffer(12, 3, n_step=2), Stream(3, 0)
        for _ in range(batches):
            buffer.extend(given.batch(1))
    other = make()
    other.load(tmp_path, row())
    assert len(other) == min(12, 3 * batches)
    assert_continues_identically(buffer, other, stream)


@pytest.mark.parametrize("batches", [0, 2, 9])
@pytest.mark.parametrize("learned", [False, True])
def test_a_loaded_prioritised_buffer_continues_identically(batches, learned, tmp_path):
    stream = Stream(3, 0)
    buffer, other = (CompactReplayBuffer(12, 3, prioritized=(0.7, 0.5)) for _ in range(2))
    for _ in range(batches):
        buffer.extend(stream.batch(1))
        if learned:
            sample = next(buffer.minibatches(1, 4, dict))
            buffer.prioritize(sample["index"], 5 * torch.rand(4))
    buffer.save(tmp_path)
    other.load(tmp_path, row())
    assert_continues_identically(buffer, other, stream)


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_saved_buffer_takes_the_bytes_of_its_frames_and_not_of_its_capacity(storage, tmp_path):
    memmap = tmp_path / "frames" if storage == "memmap" else None
    buffer, stream = CompactReplayBuffer(30_000, 3, memmap=memmap), Stream(3, 0)
    buffer.extend(stream.batch(10))
    buffer.save(tmp_path)
    assert (tmp_path / "frames.pt").stat().st_size < 0.02 * buffer.capacity * row().bytes()


@pytest.fixture
def saved(tmp_path):
    buffer, stream = CompactReplayBuffer(12, 3), Stream(3, 0)
    for _ in range(6):
        buffer.extend(stream.batch(1))
    buffer.save(tmp_path)
    return tmp_path


def test_a_missing_buffer_is_named(tmp_path):
    with pytest.raises(ReplayBufferError, match=r"frames\.pt is missing"):
        CompactReplayBuffer(12, 3).load(tmp_path / "nowhere", row())


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.99])
def test_a_buffer_cut_short_is_named(saved, share):
    path = saved / "frames.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: math.ceil(share * len(whole))])
    with pytest.raises(ReplayBufferError, match="truncated"):
        CompactReplayBuffer(12, 3).load(saved, row())


@pytest.mark.parametrize(
    "other",
    [
        CompactReplayBuffer.row(torch.zeros(FEATURES + 1), torch.zeros(ACTIONS)),
        CompactReplayBuffer.row(torch.zeros(FEATURES), torch.zeros(ACTIONS + 1)),
        CompactReplayBuffer.row(torch.zeros(FEATURES), torch.zeros((), dtype=torch.int64)),
    ],
    ids=["observation", "action", "discrete"],
)
def test_a_buffer_of_another_task_is_refused(saved, other):
    with pytest.raises(ReplayBufferError, match="of another task"):
        CompactReplayBuffer(12, 3).load(saved, other)


@pytest.mark.parametrize(("capacity", "num_envs", "key"), [(15, 3, "capacity 12"), (12, 2, "num_envs 3")])
def test_a_buffer_of_another_size_is_refused(saved, capacity, num_envs, key):
    with pytest.raises(ReplayBufferError, match=key):
        CompactReplayBuffer(capacity, num_envs).load(saved, row())


def test_a_buffer_without_priorities_is_refused_where_sampling_is_prioritised(saved):
    with pytest.raises(ReplayBufferError, match="priorities"):
        CompactReplayBuffer(12, 3, prioritized=(0.6, 0.4)).load(saved, row())


# --- The data module ------------------------------------------------------------------------------------------------


class Episodes(EpisodeEnv):
    """Episodes of given lengths, one tuple for each environment, over and over; even ones terminate.

    Observations are (environment, episode, frame); the reward of a frame is 100 environment + 10 episode + frame.
    """

    def __init__(self, num_envs=3, *, lengths=((2, 5), (4, 1), (7, 3)), device="cpu"):
        super().__init__(num_envs, max(map(max, lengths)), device)
        self.lengths = lengths
        self._make_specs(3, torch.tensor([-2.0]), torch.tensor([3.0]))
        self.steps = torch.zeros(num_envs, 1, dtype=torch.int64)
        self.episode, self.total = torch.full_like(self.steps, -1), torch.zeros(num_envs, 1)
        self.index = torch.arange(num_envs).unsqueeze(-1)

    def entries(self):
        observation = torch.cat([self.index, self.episode, self.steps], -1).float()
        counters = {"step_count": self.steps.clone(), "episode_return": self.total.clone()}
        return {"observation": observation, "is_init": self.steps == 0, **counters}

    def _reset(self, tensordict=None, **_):
        chosen = torch.ones_like(self.steps, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            chosen = tensordict["_reset"].reshape(-1, 1)
        self.episode = self.episode + chosen
        self.steps, self.total = self.steps.masked_fill(chosen, 0), self.total.masked_fill(chosen, 0)
        return TensorDict(self.entries(), batch_size=self.batch_size)

    def _step(self, tensordict):
        self.steps = self.steps + 1
        reward = (100 * self.index + 10 * self.episode + self.steps).float()
        self.total = self.total + reward
        length = [row[e % len(row)] for row, e in zip(self.lengths, self.episode.flatten().tolist(), strict=True)]
        done = self.steps >= torch.tensor(length).unsqueeze(-1)
        terminated = done & (self.episode % 2 == 0)
        ends = {"done": done, "terminated": terminated, "truncated": done & ~terminated}
        return TensorDict({**self.entries(), "reward": reward, **ends}, batch_size=self.batch_size)

    def save_state(self):
        return super().save_state() | {"steps": self.steps, "episode": self.episode, "total": self.total}

    def load_state(self, state):
        super().load_state(state)
        self.steps, self.episode, self.total = (state[key] for key in ("steps", "episode", "total"))


def data_module(root=".", ranks=1, budget=None, **options):
    """Set up as a trainer would, around a policy whose every action is 0.5."""
    policy = TensorDictModule(lambda x: torch.full_like(x[..., :1], 0.5), ["observation"], ["action"])
    data = Replay(Episodes, **{"eval_envs": 3, "batch_size": 8, "capacity": 90, **options})
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        global_rank=0,
        world_size=ranks,
        default_root_dir=str(root),
        lightning_module=SimpleNamespace(policy=policy, clock=SimpleNamespace(budget=budget)),
    )
    data.setup("fit")
    return data


def test_actions_of_the_warm_up_are_uniform_and_teach_nothing():
    data = data_module(steps=5, warmup_frames=1500, batches_per_epoch=103, updates_per_frame=0.5)
    warm, learned = [], []
    for replayed in data.train_dataloader():
        (warm if replayed.updates == 0 else learned).append(replayed.collected["action"])
        assert len(list(replayed.minibatches(dict))) == replayed.updates
    assert len(warm) == 100
    actions = (torch.cat(warm).flatten().sort().values + 2) / 5  # uniform between the bounds -2 and 3
    assert (actions - torch.linspace(0, 1, len(actions))).abs().max() < 0.042  # Kolmogorov and Smirnov's distance
    assert (torch.cat(learned) == 0.5).all()


@pytest.mark.parametrize("ratio", [0.1, 0.29, 1 / 3, 1, 1.7, 4])
@pytest.mark.parametrize(("warmup", "ranks"), [(0, 1), (10, 1), (18, 2)])
def test_updates_owed_add_up_to_the_ratio_of_the_frames_after_the_warm_up(ratio, warmup, ranks):
    data = data_module(ranks=ranks, updates_per_frame=ratio, warmup_frames=warmup, batches_per_epoch=25, steps=2)
    frames = owed = 0
    for replayed in data.train_dataloader():
        frames += 6 * ranks
        owed += replayed.updates
        assert abs(owed - max(0, frames - warmup) * ratio) < 1 + 1e-6
    assert frames == 150 * ranks


def test_what_is_sampled_is_what_was_collected():
    data = data_module(steps=4, warmup_frames=0, n_step=3, batches_per_epoch=12, updates_per_frame=0.3)
    seen = {}
    for replayed in data.train_dataloader():
        for sample in replayed.minibatches(dict):
            for k in range(8):
                index, episode, t = sample["observation"][k].int().tolist()
                length = Episodes().lengths[index][episode % 2]
                steps = int(sample["steps"][k])
                rewards = [100 * index + 10 * episode + t + j + 1 for j in range(steps)]
                assert sample["reward"][k].tolist() == rewards + [0] * (3 - steps)
                assert sample["next_observation"][k].tolist() == [index, episode, t + steps]
                assert sample["terminated"][k] == (t + steps == length and episode % 2 == 0)
                assert t + steps <= length
                seen[index, steps] = True
    assert {steps for _, steps in seen} == {1, 2, 3}


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    data = data_module(steps=2, warmup_frames=0, reward_discount=0.9, batches_per_epoch=20)
    running, returns = torch.zeros(3), []
    for replayed in data.train_dataloader():
        for t in range(2):
            running = 0.9 * running + replayed.collected["next", "reward"][:, t, 0]
            returns.append(running)
            running = running * ~replayed.collected["next", "done"][:, t, 0]
        scale = torch.stack(returns).double().std(unbiased=False)
        for sample in replayed.minibatches(dict):
            before = sample["observation"].double() @ torch.tensor([100.0, 10.0, 1.0], dtype=torch.double) + 1
            expected = (before / scale).clamp(-10, 10).float()
            torch.testing.assert_close(sample["reward"][:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"prioritized": (0.6, 0.4)}, {"storage": "memmap"}, {"reward_discount": 0.9}])
@pytest.mark.parametrize("batches", [1, 2, 9])
def test_a_stopped_collection_goes_on_as_if_it_had_not_stopped(options, batches, tmp_path):
    make = partial(data_module, steps=2, warmup_frames=9, updates_per_frame=0.5, capacity=24, **options)

    def go(data, count):
        out = []
        for _ in range(count):
            replayed = data.train_dataloader().next()
            for sample in replayed.minibatches(dict):
                out.append(sample)
                if replayed.prioritize is not None:
                    replayed.prioritize(sample["index"], sample["observation"].sum(-1))
            out.append({"collected": replayed.collected["observation"], "action": replayed.collected["action"]})
        return out

    def seeded(count, root):
        torch.manual_seed(3), np.random.seed(3)
        return go(root, count)

    data = make(tmp_path / "a")
    go(data, batches)
    state = deepcopy(data.collection_state())
    assert data.save_buffer(tmp_path / "buffer")
    expected = seeded(6, data)
    other = make(tmp_path / "b")
    other.restore_collection(state)
    other.restore_buffer(tmp_path / "buffer")
    other.train_dataloader()
    again = seeded(6, other)
    for a, b in zip(expected, again, strict=True):
        for key, value in a.items():
            assert torch.equal(value, b[key]), key


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"steps": 0}, "data.steps is 0"),
        ({"capacity": 0}, "data.capacity is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"n_step": 0}, "data.n_step is 0"),
        ({"warmup_frames": -1}, "data.warmup_frames is -1"),
        ({"updates_per_frame": 0.0}, "data.updates_per_frame is 0"),
        ({"capacity": 7}, "less than data.batch_size 8"),
        ({"prioritized": [0.5]}, "data.prioritized is"),
        ({"prioritized": [0.5, 1.5]}, "data.prioritized is"),
        ({"storage": "disk"}, "data.storage is 'disk'"),
        ({"reward_discount": 1.0}, "data.reward_discount is 1.0"),
        ({"batches_per_epoch": 0}, "data.batches_per_epoch"),
        ({"eval_envs": 0}, "data.eval_envs"),
        ({"eval_mode": "best"}, "data.eval_mode"),
        ({"ranks": 3}, "8, which 3 ranks cannot share"),
        ({"steps": 31}, "less than the 93 frames that are collected at once"),
        ({"budget": 1000, "warmup_frames": 1000}, "nothing would be learned"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        data_module(**options).train_dataloader()


# --- Evaluation -----------------------------------------------------------------------------------------------------


def test_an_evaluation_counts_exactly_the_first_episode_of_each_environment():
    env = Episodes()
    env.rollout(3)  # the evaluation begins afresh, whatever was before
    env.episode.fill_(-1)
    policy = TensorDictModule(lambda x: x[..., :1], ["observation"], ["action"])
    ends = first_episodes(env, policy)["next"]
    assert ends["step_count"].flatten().tolist() == [2, 4, 7]
    returns = [sum(100 * index + t for t in range(1, length + 1)) for index, length in enumerate((2, 4, 7))]
    assert ends["episode_return"].flatten().tolist() == returns
    assert (env.episode == 0).all()  # nothing is begun that would not be counted
