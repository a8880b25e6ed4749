"""A replay buffer that stores every observation once gives what a list of all transitions gives."""

import math
import random
from copy import deepcopy
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.envs import BatchedEnv
from lightning_hyper.experience import Replay
from lightning_hyper.experience.replay_buffer import CheckpointError, CompactReplayBuffer, Priorities, split

FEATURES, ACTIONS, STATE = 3, 2, 4


class Stream:
    """Random episodes of `num_envs` environments in which no observation comes twice, and the list of all frames."""

    def __init__(self, num_envs, seed, ends=0.3):
        self.pick, self.ends, self.count = random.Random(seed), ends, 0
        self.now = [self.fresh() for _ in range(num_envs)]
        self.begun = [True] * num_envs
        self.frames = [[] for _ in range(num_envs)]

    def fresh(self):
        self.count += 1
        return torch.tensor([float(self.count), self.pick.random(), self.pick.random()])

    def frame(self, env):
        kind = self.pick.random()
        terminated, truncated = kind < self.ends / 2, self.ends / 2 <= kind < self.ends
        frame = {
            "observation": self.now[env],
            "is_init": torch.tensor([self.begun[env]]),
            "context_state": torch.tensor([self.pick.random() for _ in range(STATE)]),
            "action": torch.tensor([self.pick.uniform(-2, 2) for _ in range(ACTIONS)]),
            "reward": self.pick.uniform(-1, 1),
            "next_observation": self.fresh(),
            "terminated": terminated,
            "done": terminated or truncated,
        }
        self.now[env] = self.fresh() if frame["done"] else frame["next_observation"]
        self.begun[env] = frame["done"]
        self.frames[env].append(frame)
        return frame

    def batch(self, steps):
        """A collected batch `[num_envs, steps]`, as a collector gives it."""
        rows = [[self.frame(env) for _ in range(steps)] for env in range(len(self.now))]

        def column(key):
            return torch.stack([torch.stack([torch.as_tensor(f[key]) for f in row]) for row in rows])

        after = {key: column(key).unsqueeze(-1) for key in ("reward", "terminated", "done")}
        after |= {"observation": column("next_observation"), "is_init": torch.zeros_like(column("is_init"))}
        now = {key: column(key) for key in ("observation", "is_init", "action", "context_state")}
        return TensorDict({**now, "next": after}, batch_size=[len(self.now), steps])

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
            "is_init": frames[t]["is_init"],
            "next_is_init": torch.tensor([False]),
            "action": frames[t]["action"],
            "reward": torch.tensor(rewards + [0.0] * (n_step - len(rewards))),
            "steps": torch.tensor(len(rewards)),
            "next_observation": last["next_observation"],
            "terminated": torch.tensor(last["terminated"]),
        }


def buffer_of(capacity, num_envs, *, features=FEATURES, actions=(ACTIONS,), dtype=torch.float32, **options):
    shown = {"observation": torch.zeros(features), "is_init": torch.zeros(1, dtype=torch.bool)}
    return CompactReplayBuffer(capacity, num_envs, shown, torch.zeros(actions, dtype=dtype), **options)


def sampled(buffer, count, size=16):
    """Minibatches put together, by entry."""
    parts = [part for block in buffer.blocks(count, size) for part in split(block, size)]
    assert len(parts) == count
    assert all(len(part["action"]) == size for part in parts)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def assert_equals_the_list(buffer, stream, n_step, count=40):
    stored, sample = stream.stored(buffer.capacity), sampled(buffer, count)
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
    buffer = buffer_of(num_envs * kept, num_envs, n_step=n_step, memmap=tmp_path if storage == "memmap" else None)
    stream = Stream(num_envs, seed, ends=(1.0, 0.0, 0.2, 0.6)[seed])
    written = 0
    while written < 25 * kept:  # wraps around 25 times
        steps = pick.randint(1, min(3, kept))
        buffer.extend(stream.batch(steps))
        written += steps
        assert_equals_the_list(buffer, stream, n_step, count=1)


@pytest.mark.parametrize("batches", [3, 11])
def test_uniform_samples_cover_all_stored_frames_evenly(batches):
    buffer, stream = buffer_of(16, 2), Stream(2, 0)
    for _ in range(batches):
        buffer.extend(stream.batch(1))
    seen, stored = assert_equals_the_list(buffer, stream, 1)
    assert seen == stored
    counts = sampled(buffer, 1000)["observation"][:, 0].unique(return_counts=True)[1]
    assert (counts / counts.sum() * len(stored) - 1).abs().max() < 0.15


def test_capacity_is_rounded_up_to_whole_steps_and_a_batch_may_fill_it():
    buffer, stream = buffer_of(10, 4), Stream(4, 0)
    assert buffer.capacity == 12
    for _ in range(5):
        buffer.extend(stream.batch(3))
        assert_equals_the_list(buffer, stream, 1)


@pytest.mark.parametrize(("state", "more"), [({}, 0), ({"state_features": STATE}, STATE * 4)])
def test_a_frame_takes_the_bytes_of_one_observation(state, more):
    buffer, stream = buffer_of(64, 2, **state), Stream(2, 0)
    buffer.extend(stream.batch(4))
    # Observation, is_init, action, reward, terminated, number of an end.
    assert buffer.frame_bytes == FEATURES * 4 + 1 + ACTIONS * 4 + 4 + 1 + 4 + more
    held = sum(entry.untyped_storage().nbytes() for entry in buffer._frames.values())
    assert held == buffer.frame_bytes * buffer.capacity


def test_observations_at_episodes_ends_are_forgotten_with_their_frames():
    buffer, stream = buffer_of(40, 2), Stream(2, 0, ends=1.0)
    for _ in range(300):
        buffer.extend(stream.batch(1))
    assert len(buffer._ends._rows["observation"]) <= 2 * (40 + 2)


# --- Windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sequence", [2, 5])
def test_every_window_is_one_of_consecutive_frames_with_what_follows_each(seed, sequence):
    pick = random.Random(seed)
    num_envs, kept = pick.randint(1, 4), pick.randint(sequence, 12)
    buffer = buffer_of(num_envs * kept, num_envs, sequence=sequence, state_features=STATE)
    stream, written = Stream(num_envs, seed, ends=(1.0, 0.0, 0.2, 0.6)[seed]), 0
    while written < 15 * kept:
        steps = pick.randint(1, min(3, kept))
        buffer.extend(stream.batch(steps))
        written += steps
        if written < sequence:
            continue
        stored = stream.stored(buffer.capacity)
        ((sample,),) = ([*split(block, 16)] for block in buffer.blocks(1, 16))
        for k in range(16):
            env, t = stored[int(sample["window_observation"][k, sample["place"][k, 0], 0])]
            assert torch.equal(sample["context_state"][k], stream.frames[env][t]["context_state"])
            for j in range(sequence):
                frame, place = stream.frames[env][t + j], sample["place"][k, j]
                assert torch.equal(sample["window_observation"][k, place], frame["observation"])
                assert torch.equal(sample["window_observation"][k, place + 1], frame["next_observation"])
                assert sample["window_is_init"][k, place] == frame["is_init"]
                assert not sample["window_is_init"][k, place + 1]
                assert torch.equal(sample["action"][k, j], frame["action"])
                assert sample["reward"][k, j].tolist() == pytest.approx([frame["reward"]])
                assert sample["terminated"][k, j] == frame["terminated"]
                assert sample["steps"][k, j] == 1


def test_windows_begin_evenly_wherever_enough_frames_follow():
    buffer, stream = buffer_of(16, 2, sequence=3, state_features=STATE), Stream(2, 0)
    for _ in range(11):
        buffer.extend(stream.batch(1))
    first = sampled(buffer, 1000)["window_observation"][:, 0, 0].int()
    begins = {number for number, (_, t) in stream.stored(16).items() if t <= 11 - 3}
    assert set(first.tolist()) == begins
    counts = first.unique(return_counts=True)[1]
    assert (counts / counts.sum() * len(begins) - 1).abs().max() < 0.15


# --- Prioritised sampling -------------------------------------------------------------------------------------------


@pytest.fixture
def prioritized():
    """A prioritised buffer whose frames have the error of their observation's number; the errors."""
    buffer, stream = buffer_of(8, 2, prioritized=(0.6, 0.4), n_step=2), Stream(2, 0)
    for _ in range(7):
        buffer.extend(stream.batch(1))
    stored = stream.stored(8)
    errors = {number: 0.1 + k for k, number in enumerate(stored)}
    for _ in range(40):
        (sample,) = buffer.blocks(1, 8)
        numbers = sample["observation"][:, 0].int().tolist()
        buffer.prioritize(sample["index"], torch.tensor([errors[n] for n in numbers]))
    return buffer, stream, errors


def test_prioritised_samples_follow_the_errors_to_alpha(prioritized):
    buffer, stream, errors = prioritized
    seen, stored = assert_equals_the_list(buffer, stream, 2)
    assert seen <= stored
    numbers = sampled(buffer, 2000)["observation"][:, 0].int()
    total = sum(error**0.6 for error in errors.values())
    for number, error in errors.items():
        assert (numbers == number).float().mean().item() == pytest.approx(error**0.6 / total, abs=0.01)


def test_weights_are_the_inverse_probabilities_to_beta_over_the_largest(prioritized):
    buffer, _, errors = prioritized
    for sample in buffer.blocks(20, 8):
        of = [errors[int(n)] for n in sample["observation"][:, 0]]
        expected = [(error / min(of)) ** (-0.6 * 0.4) for error in of]
        torch.testing.assert_close(sample["weight"], torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("capacity", [1, 2, 9, 30, 1000])
def test_draws_are_in_proportion_to_priorities_and_never_of_none(capacity):
    priorities, expected = Priorities(capacity, torch.device("cpu")), torch.zeros(capacity, dtype=torch.float64)
    for _ in range(20):
        rows = torch.randint(capacity, (5,)).unique()
        given = torch.rand(len(rows), dtype=torch.float64) * (torch.rand(len(rows)) < 0.7)
        priorities.set(rows, given)
        expected[rows] = given
    rows, priority = priorities.draw(50_000)
    assert torch.equal(priority, expected[rows])
    assert (priority > 0).all()
    share = torch.bincount(rows, minlength=capacity) / 50_000
    torch.testing.assert_close(share.double(), expected / expected.sum(), atol=0.01, rtol=0)


def test_a_share_that_is_rounded_up_to_the_whole_draws_the_last_row_that_has_a_priority(monkeypatch):
    priorities = Priorities(27, torch.device("cpu"))
    priorities.set(torch.tensor([3, 13]), torch.tensor([0.5, 0.1], dtype=torch.float64))
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(size, dtype=options["dtype"]))
    assert priorities.draw(2)[0].tolist() == [13, 13]


def test_a_new_frame_has_the_largest_priority(prioritized):
    buffer, stream, errors = prioritized
    buffer.extend(stream.batch(1))
    stored = stream.stored(8)
    priority = {n: errors.get(n, max(errors.values())) ** 0.6 for n in stored}
    numbers = sampled(buffer, 2000)["observation"][:, 0].int()
    for number in set(stored) - set(errors):
        share = priority[number] / sum(priority.values())
        assert (numbers == number).float().mean().item() == pytest.approx(share, abs=0.015)


# --- Saving and loading ---------------------------------------------------------------------------------------------


def assert_continues_identically(buffer, other, stream):
    for _ in range(12):
        batch = stream.batch(1)
        samples = []
        for each in (buffer, other):
            torch.manual_seed(5)
            each.extend(batch)
            sample = sampled(each, 2)
            if "index" in sample:
                each.prioritize(sample["index"], sample["observation"][:, 0])
            samples.append(sample)
        for key, value in samples[0].items():
            assert torch.equal(value, samples[1][key]), key


@pytest.mark.parametrize("batches", [0, 1, 4, 9])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_loaded_buffer_continues_identically(batches, storage, tmp_path):
    def make():
        return buffer_of(12, 3, n_step=2, memmap=tmp_path / "frames" if storage == "memmap" else None)

    stream, buffer = Stream(3, 0), make()
    for _ in range(batches):
        buffer.extend(stream.batch(1))
    buffer.save(tmp_path)
    if storage == "memmap":  # a continued run finds the files of the one before, so the two cannot live side by side
        buffer, given = buffer_of(12, 3, n_step=2), Stream(3, 0)
        for _ in range(batches):
            buffer.extend(given.batch(1))
    other = make()
    other.load(tmp_path, 3 * batches)
    assert len(other) == min(12, 3 * batches)
    assert_continues_identically(buffer, other, stream)


@pytest.mark.parametrize("batches", [0, 2, 9])
@pytest.mark.parametrize("learned", [False, True])
def test_a_loaded_prioritised_buffer_continues_identically(batches, learned, tmp_path):
    stream = Stream(3, 0)
    buffer, other = (buffer_of(12, 3, prioritized=(0.7, 0.5)) for _ in range(2))
    for _ in range(batches):
        buffer.extend(stream.batch(1))
        if learned:
            (sample,) = buffer.blocks(1, 4)
            buffer.prioritize(sample["index"], 5 * torch.rand(4))
    buffer.save(tmp_path)
    other.load(tmp_path, 3 * batches)
    assert_continues_identically(buffer, other, stream)


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_saved_buffer_takes_the_bytes_of_its_frames_and_not_of_its_capacity(storage, tmp_path):
    memmap = tmp_path / "frames" if storage == "memmap" else None
    buffer, stream = buffer_of(30_000, 3, memmap=memmap), Stream(3, 0)
    buffer.extend(stream.batch(10))
    buffer.save(tmp_path)
    assert (tmp_path / "frames.pt").stat().st_size < 0.02 * buffer.capacity * buffer.frame_bytes


@pytest.fixture
def saved(tmp_path):
    buffer, stream = buffer_of(12, 3), Stream(3, 0)
    for _ in range(6):
        buffer.extend(stream.batch(1))
    buffer.save(tmp_path)
    return tmp_path


def test_a_missing_buffer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"frames\.pt is missing"):
        buffer_of(12, 3).load(tmp_path / "nowhere", 18)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.99])
def test_a_buffer_cut_short_is_named(saved, share):
    path = saved / "frames.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: math.ceil(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        buffer_of(12, 3).load(saved, 18)


@pytest.mark.parametrize(
    "options",
    [
        {"features": FEATURES + 1},
        {"actions": (ACTIONS + 1,)},
        {"actions": (), "dtype": torch.int64},
        {"state_features": 2},
    ],
    ids=["observation", "action", "discrete", "memory"],
)
def test_a_buffer_of_another_task_is_refused(saved, options):
    with pytest.raises(CheckpointError, match="of another task"):
        buffer_of(12, 3, **options).load(saved, 18)


@pytest.mark.parametrize(("capacity", "num_envs", "key"), [(15, 3, "capacity 12"), (12, 2, "num_envs 3")])
def test_a_buffer_of_another_size_is_refused(saved, capacity, num_envs, key):
    with pytest.raises(CheckpointError, match=key):
        buffer_of(capacity, num_envs).load(saved, 18)


def test_a_buffer_without_priorities_is_refused_where_sampling_is_prioritised(saved):
    with pytest.raises(CheckpointError, match="priorities"):
        buffer_of(12, 3, prioritized=(0.6, 0.4)).load(saved, 18)


# --- Experience -----------------------------------------------------------------------------------------------------


class Episodes(BatchedEnv):
    """Episodes of given lengths, one tuple for each environment, over and over; even ones terminate.

    Observations are (environment, episode, frame); the reward of a frame is 100 environment + 10 episode + frame.
    """

    def __init__(self, num_envs=3, *, lengths=((2, 5), (4, 1), (7, 3)), device="cpu"):
        super().__init__(num_envs, device)
        self.lengths, self.horizon = lengths, max(map(max, lengths))
        self._make_specs((3,), (torch.tensor([-2.0]), torch.tensor([3.0])))
        self.frame = torch.zeros(num_envs, dtype=torch.int64)
        self.episode = torch.full_like(self.frame, -1)

    def start(self, rows):
        self.episode, self.frame = self.episode + rows, self.frame.masked_fill(rows, 0)

    def observation(self):
        return torch.stack([torch.arange(len(self.frame)), self.episode, self.frame], -1).float()

    def over(self):
        length = [row[e % len(row)] for row, e in zip(self.lengths, self.episode.tolist(), strict=True)]
        return self.frame >= torch.tensor(length)

    def simulate(self, action):
        self.frame = self.frame + 1
        reward = (100 * torch.arange(len(self.frame)) + 10 * self.episode + self.frame).float()
        return self.observation(), reward, self.over() & (self.episode % 2 == 0)

    def truncated(self, step_count):
        return self.over().unsqueeze(-1)

    def snapshot(self):
        return {"frame": self.frame, "episode": self.episode}

    def restore(self, state):
        self.frame, self.episode = state["frame"], state["episode"]


class Half:
    """A policy whose every action is 0.5."""

    window_keys, state_features = ("observation",), 0

    def act(self, step, state):
        return {"action": torch.full_like(step["observation"][:, :1], 0.5)}, state


class Counting(Half):
    """It carries the sum of the observations that it saw in its episode, and acts by it."""

    window_keys, state_features = ("observation", "is_init"), 3

    def act(self, step, state):
        state = torch.zeros_like(step["observation"]) if state is None else state
        state = state * ~step["is_init"] + step["observation"]
        return {"action": state[:, :1].sin()}, state


def experience(root=None, ranks=1, budget=None, policy=None, **options):
    data = Replay(Episodes, **{"batch_size": 8, "capacity": 90, **options})
    data.connect(ranks=ranks)
    data.begin(policy or Half(), folder=root, budget=budget)
    return data


def minibatches(replayed):
    return [part for block in replayed.blocks() for part in split(block, replayed.batch_size)]


def test_actions_of_the_warm_up_are_uniform_and_teach_nothing():
    data = experience(steps=5, warmup_frames=1500, updates_per_frame=0.5)
    warm, learned = [], []
    for _ in range(103):
        replayed = data.collect()
        (warm if replayed.updates == 0 else learned).append(replayed.collected["action"])
        assert len(minibatches(replayed)) == replayed.updates
    assert len(warm) == 100
    actions = (torch.cat(warm).flatten().sort().values + 2) / 5  # uniform between the bounds -2 and 3
    assert (actions - torch.linspace(0, 1, len(actions))).abs().max() < 0.042  # Kolmogorov and Smirnov's distance
    assert (torch.cat(learned) == 0.5).all()


@pytest.mark.parametrize("ratio", [0.1, 0.29, 1 / 3, 1, 1.7, 4])
@pytest.mark.parametrize(("warmup", "ranks"), [(0, 1), (10, 1), (18, 2)])
def test_updates_owed_add_up_to_the_ratio_of_the_frames_after_the_warm_up(ratio, warmup, ranks):
    data = experience(ranks=ranks, updates_per_frame=ratio, warmup_frames=warmup, steps=2)
    frames = owed = 0
    for _ in range(25):
        replayed = data.collect()
        frames += 6 * ranks
        owed += replayed.updates
        assert replayed.batch_size == 8 // ranks
        assert abs(owed - max(0, frames - warmup) * ratio) < 1 + 1e-6
    assert frames == 150 * ranks


def test_what_is_sampled_is_what_was_collected():
    data = experience(steps=4, warmup_frames=0, n_step=3, updates_per_frame=0.3)
    seen = {}
    for _ in range(12):
        for sample in minibatches(data.collect()):
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


@pytest.mark.parametrize("warmup", [21, 10_000])
def test_windows_begin_with_the_memory_that_the_policy_had_there(warmup):
    data = experience(policy=Counting(), steps=4, sequence=7, warmup_frames=warmup)
    for _ in range(12):
        data.collect()
    for sample in (part for block in data.buffer.blocks(5, 8) for part in split(block, 8)):
        state = sample["context_state"]
        for k in range(8):
            index, episode, t = sample["window_observation"][k, 0].tolist()
            begun = t > 0  # what it had at a first frame is the episode's before, and of no use
            assert not begun or state[k].tolist() == [index * t, episode * t, sum(range(int(t)))]
            assert sample["window_is_init"][k, 0] == (not begun)


@pytest.mark.parametrize(
    "options",
    [{}, {"prioritized": (0.6, 0.4)}, {"storage": "memmap"}, {"policy": Counting(), "sequence": 3}],
    ids=["plain", "prioritized", "memmap", "windows"],
)
@pytest.mark.parametrize("batches", [2, 9])
def test_a_stopped_collection_goes_on_as_if_it_had_not_stopped(options, batches, tmp_path):
    make = partial(experience, steps=2, warmup_frames=9, updates_per_frame=0.5, capacity=24, **options)

    def go(data, count):
        out = []
        for _ in range(count):
            replayed = data.collect()
            for block in replayed.blocks():
                for sample in split(block, replayed.batch_size):
                    out.append(sample)
                    replayed.prioritize(sample, sample["reward"].abs().sum(-1))
            out.append({"collected": replayed.collected["observation"], "action": replayed.collected["action"]})
        return out

    data = make(tmp_path / "a")
    go(data, batches)
    state = deepcopy(data.save_state())
    assert data.save_buffer(tmp_path / "buffer")
    torch.manual_seed(3)
    expected = go(data, 6)
    other = make(tmp_path / "b")
    other.load_state(state)
    other.load_buffer(tmp_path / "buffer")
    torch.manual_seed(3)
    again = go(other, 6)
    assert len(again) == len(expected) > 6
    for a, b in zip(expected, again, strict=True):
        for key, value in a.items():
            assert torch.equal(value, b[key]), key


def test_there_is_nothing_to_save_before_it_has_begun(tmp_path):
    data = Replay(Episodes)
    assert data.save_state() == {}
    assert not data.save_buffer(tmp_path)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"steps": 0}, "Replay.steps is 0"),
        ({"capacity": 0}, "Replay.capacity is 0"),
        ({"batch_size": 0}, "Replay.batch_size is 0"),
        ({"n_step": 0}, "Replay.n_step is 0"),
        ({"sequence": 0}, "Replay.sequence is 0"),
        ({"warmup_frames": -1}, "Replay.warmup_frames is -1"),
        ({"updates_per_frame": 0.0}, "Replay.updates_per_frame is 0"),
        ({"capacity": 7}, "data.capacity is 7; it must be at least data.batch_size, 8"),
        ({"prioritized": [0.5]}, "prioritized is"),
        ({"prioritized": [0.5, 1.5]}, "prioritized is"),
        ({"storage": "disk"}, "Replay.storage is 'disk'"),
        ({"storage": "memmap"}, "data.storage is memmap, which needs the folder"),
        ({"ranks": 3}, "8, which 3 ranks cannot share"),
        ({"steps": 31}, "less than the 93 frames that are collected at once"),
        ({"budget": 1000, "warmup_frames": 1000}, "nothing would be learned"),
        ({"sequence": 5}, "data.sequence is 5, but no model.context carries a memory"),
        ({"policy": Counting()}, "data.sequence is 1, but model.context carries a memory"),
        ({"policy": Counting(), "sequence": 5, "n_step": 2}, "data.sequence is 5; .* data.n_step 2"),
        ({"policy": Counting(), "sequence": 5, "prioritized": [0.5, 0.5]}, "data.sequence is 5; .* data.prioritized"),
        ({"policy": Counting(), "sequence": 5, "warmup_frames": 14}, "data.sequence is 5: .* data.warmup_frames 15"),
        ({"policy": Counting(), "sequence": 31}, "data.sequence is 31: data.capacity must be at least 93"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        experience(**options)
