"""The MuJoCo families follow gymnasium's own environments, step by step."""

import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from lightning_hyper import envs
from lightning_hyper.envs import Ant, HalfCheetah, Hopper, InvertedPendulum, MuJoCo, Reacher, Walker2d

FAMILIES = [
    ("HalfCheetah", 17, 1.0),
    ("Hopper", 11, 1.0),
    ("Walker2d", 17, 1.0),
    ("Ant", 105, 1.0),
    ("InvertedPendulum", 4, 3.0),
    ("InvertedDoublePendulum", 9, 1.0),
    ("Reacher", 10, 1.0),
]
NAMES = [name for name, _, _ in FAMILIES]


def made(name, *args, **options):
    return getattr(envs, name)(*args, **options)


def reference(name):
    # gymnasium's HalfCheetah file has an attribute that MuJoCo warns of, in a file of the working directory by default.
    mujoco.set_mju_user_warning(lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = gymnasium.make(f"{name}-v5").unwrapped
    mujoco.set_mju_user_warning(None)
    return made


def begin(other, env, row):
    """Start gymnasium's environment where simulator `row` has just been reset to."""
    mujoco.mj_resetData(other.model, other.data)
    other.set_state(env.qpos()[row], env.now["qvel"][row])


def actions_for(env, steps, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(steps, *env.action_spec.shape, generator=generator) * 2 - 1
    return unit * env.action_spec.high * scale


@pytest.mark.parametrize(("name", "features", "bound"), FAMILIES)
def test_specs_hold_and_are_gymnasiums(name, features, bound):
    env, other = made(name, 3), reference(name)
    check_env_specs(env)
    assert env.observation_spec["observation"].shape == (3, features) == (3, *other.observation_space.shape)
    assert env.action_spec.shape == (3, *other.action_space.shape)
    assert torch.equal(env.action_spec.high[1], torch.from_numpy(other.action_space.high))
    assert torch.equal(env.action_spec.low[1], torch.from_numpy(other.action_space.low))
    assert env.action_spec.high.max() == bound
    assert env.horizon == gymnasium.spec(f"{name}-v5").max_episode_steps
    assert env.seconds == pytest.approx(other.dt)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_equals_gymnasiums_through_partial_resets(name):
    env = made(name, 3, episode_steps=45)
    env.set_seed(1)
    step = env.reset()
    others = [reference(name) for _ in range(3)]
    for row, other in enumerate(others):
        begin(other, env, row)
    # Simulators end at different frames from here on.
    _, step = env.step_and_maybe_reset(step.set("action", torch.zeros(env.action_spec.shape)))
    step["_reset"] = torch.tensor([[True], [False], [False]])
    step = env.reset(step)
    begin(others[0], env, 0)
    for other in others[1:]:
        other.step(np.zeros(other.model.nu))
    ends, seen = 0, []
    for action in actions_for(env, 300):
        step["action"] = action
        full, step = env.step_and_maybe_reset(step)
        following = full["next"]
        seen.append(following["observation"])
        for row, other in enumerate(others):
            observation, reward, terminated, _, _ = other.step(action[row].double().numpy())
            np.testing.assert_allclose(following["observation"][row].numpy(), observation, rtol=1e-6, atol=1e-7)
            assert following["reward"][row].item() == pytest.approx(reward, rel=1e-6, abs=1e-7)
            assert following["terminated"][row].item() == terminated
            if following["done"][row]:
                ends += 1
                begin(other, env, row)
                np.testing.assert_allclose(step["observation"][row].numpy(), other._get_obs(), rtol=1e-6, atol=1e-7)
    assert ends >= 3 * 6
    # Nothing agreed by standing still; forces have a test of their own.
    moving = torch.cat(seen).std(0) > 0
    assert moving[: {"Ant": 27, "InvertedDoublePendulum": 8}.get(name)].all()


@pytest.mark.parametrize(("name", "lowest", "start"), [("Ant", 27, -0.3), ("InvertedDoublePendulum", 8, 0.98)])
def test_forces_of_contact_are_gymnasiums(name, lowest, start):
    """Ant lands on the floor; the cart runs into the end of its rail."""
    env, other = made(name, 1), reference(name)
    env.reset()
    begin(other, env, 0)
    qpos, qvel = env.models[0].qpos0.copy()[None], np.zeros((1, other.model.nv))
    qpos[0, 2 if name == "Ant" else 0] += start
    qvel[0, 0] = 2
    env.set_physics(qpos, qvel)
    other.set_state(qpos[0], qvel[0])
    forces = []
    for action in actions_for(env, 30)[:, 0].numpy():
        observation, reward, _ = env.advance(torch.from_numpy(action[None]))
        expected = other.step(action)
        np.testing.assert_allclose(observation[0], expected[0], rtol=1e-6, atol=1e-7)
        assert reward[0] == pytest.approx(expected[1], rel=1e-6)
        forces.append(np.abs(expected[0][lowest:]).max())
    assert max(forces) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_set_physics_is_gymnasiums_set_state(name):
    env, other = made(name, 2), reference(name)
    env.reset()
    begin(other, env, 1)
    rng = np.random.default_rng(0)
    first, second = rng.uniform(-1, 1, (2, 2, other.model.nu))
    qpos = env.models[0].qpos0 + rng.uniform(-0.05, 0.05, (2, other.model.nq))
    qvel = rng.normal(size=(2, other.model.nv))
    for action in (first, second):
        observation, reward, terminated = env.advance(torch.from_numpy(action))
        expected = other.step(action[1])
        np.testing.assert_allclose(observation[1], expected[0], rtol=1e-6, atol=1e-7)
        assert (reward[1], terminated[1]) == (pytest.approx(expected[1], rel=1e-6), expected[2])
        env.set_physics(qpos, qvel)
        other.set_state(qpos[1], qvel[1])
        np.testing.assert_allclose(env.observation()[1], other._get_obs())


@pytest.mark.parametrize("name", NAMES)
def test_resets_have_gymnasiums_distribution(name):
    env, other = made(name), reference(name)
    env.set_seed(0)
    qpos, qvel = env.draw(20_000)
    theirs = []
    for seed in range(500):
        other.reset(seed=seed)
        theirs.append(np.concatenate((other.data.qpos, other.data.qvel)))
    mine, theirs = np.concatenate((qpos, qvel), axis=1), np.stack(theirs)
    std = theirs.std(0)
    assert (np.abs(mine.mean(0) - theirs.mean(0)) <= 5 * std / 500**0.5 + 1e-12).all()
    np.testing.assert_allclose(mine.std(0), std, rtol=0.17, atol=1e-12)
    # Where gymnasium's draws are bounded, so are these, and they come as close to the bounds.
    bounded = np.abs(theirs - theirs.mean(0)).max(0) < 2.2 * std
    assert bounded[: other.model.nq].all()
    spread = np.ptp(mine, axis=0) / np.where(std > 0, np.ptp(theirs, axis=0), 1)
    assert (spread[bounded & (std > 0)] < 1.1).all()
    assert (spread[bounded & (std > 0)] > 0.99).all()


def test_reacher_targets_are_uniform_over_the_disc():
    targets = Reacher().draw(20_000)[0][:, 2:]
    distance = np.linalg.norm(targets, axis=1)
    assert distance.max() < 0.2
    for part in (0.25, 0.5, 0.75):
        assert (distance < 0.2 * part**0.5).mean() == pytest.approx(part, abs=0.02)


def test_truncation_at_the_limit_is_no_termination():
    env = HalfCheetah(2, episode_steps=5)
    batch = env.rollout(10, break_when_any_done=False)
    following = batch["next"]
    assert following["truncated"][0, :, 0].tolist() == ([False] * 4 + [True]) * 2
    assert torch.equal(following["done"], following["truncated"])
    assert not following["terminated"].any()
    assert following["step_count"][1, :, 0].tolist() == [1, 2, 3, 4, 5] * 2
    assert batch["is_init"][0, :, 0].tolist() == ([True] + [False] * 4) * 2
    assert not following["is_init"].any()


def test_termination_at_the_limit_is_no_truncation():
    env = Hopper(1, episode_steps=1)
    step = env.reset()
    env.set_physics(env.qpos() - np.array([0, 1.0, 0, 0, 0, 0]), env.now["qvel"])
    following = env.step(step.set("action", torch.zeros(1, 3)))["next"]
    assert [following[key].item() for key in ("done", "terminated", "truncated")] == [True, True, False]


def test_episode_return_sums_the_rewards_since_the_reset(play):
    env = InvertedPendulum(4, episode_steps=20)
    env.set_seed(0)
    following, _ = play(env, env.reset(), actions_for(env, 60))
    for row in range(4):
        total, episodes = 0.0, 0
        entries = (following[key][:, row, 0] for key in ("reward", "episode_return", "done"))
        for reward, given, done in zip(*entries, strict=True):
            total += reward.item()
            assert given.item() == pytest.approx(total)
            total, episodes = (0.0, episodes + 1) if done else (total, episodes)
        assert episodes >= 3


def test_partial_reset_leaves_the_others_alone(play):
    env = Ant(4)
    env.set_seed(0)
    following, step = play(env, env.reset(), actions_for(env, 20))
    before = {name: array.copy() for name, array in env.now.items()}
    step["_reset"] = torch.tensor([[False], [True], [False], [True]])
    after = env.reset(step.clone())
    for key in ("observation", "step_count", "episode_return", "is_init", "done"):
        assert torch.equal(after[key][[0, 2]], following[-1][key][[0, 2]])
    assert after["step_count"].squeeze(-1).tolist() == [20, 0, 20, 0]
    assert after["is_init"].squeeze(-1).tolist() == [False, True, False, True]
    assert after["episode_return"][[1, 3]].tolist() == [[0], [0]]
    for name, array in env.now.items():
        assert np.array_equal(array[[0, 2]], before[name][[0, 2]])
        assert not np.array_equal(array[[1, 3]], before[name][[1, 3]])


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_object_continues_bit_for_bit(play, name):
    env, other = (made(name, 3, episode_steps=40) for _ in range(2))
    env.set_seed(0)
    actions = actions_for(env, 100)
    _, step = play(env, env.reset(), actions[:25])
    other.load_state({key: value.clone() for key, value in env.save_state().items()})
    # Without the solver's start only last bits would differ, and only after many frames.
    for (_, mine), (_, theirs) in zip(env._simulators, other._simulators, strict=True):
        assert np.array_equal(mine.qacc_warmstart, theirs.qacc_warmstart)
    start = step.clone()
    expected, _ = play(env, step, actions[25:])
    found, _ = play(other, start, actions[25:])
    assert expected["done"].any()
    for key in ("observation", "reward", "terminated", "truncated", "step_count", "episode_return"):
        assert torch.equal(found[key], expected[key]), key
    end = env.save_state()
    assert end["simulators"].dtype == torch.float64
    for key, value in other.save_state().items():
        assert torch.equal(value, end[key]), key


@pytest.mark.parametrize("name", ["HalfCheetah", "Ant", "Hopper"])
def test_threads_change_nothing(play, name):
    found = []
    for threads in (1, 2, 3):
        env = made(name, 7, episode_steps=30, threads=threads)
        env.set_seed(0)
        found.append(play(env, env.reset(), actions_for(env, 50))[0])
    for other in found[1:]:
        for key in ("observation", "reward", "done", "episode_return"):
            assert torch.equal(found[0][key], other[key])


def test_seeds_reproduce_and_differ():
    env = Hopper(4)
    starts = []
    for seed in (3, 3, 4):
        env.set_seed(seed)
        starts.append(env.reset()["observation"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert len(starts[0].unique(dim=0)) == 4


@pytest.mark.parametrize("family", [Hopper, Walker2d, Ant, InvertedPendulum])
def test_a_state_that_is_not_a_number_terminates(family):
    env = family(2)
    assert not env.terminated().any()
    env.now["qpos"][1, 2 if family is not InvertedPendulum else 1] = np.nan
    assert env.terminated().tolist() == [False, True]


def test_half_cheetah_is_gymnasiums_model_without_its_warning(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = HalfCheetah().models[0]
    assert "settotalmass" not in "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())
    theirs = reference("HalfCheetah").model
    arrays = [key for key in dir(mine) if isinstance(getattr(mine, key), np.ndarray)]
    assert len(arrays) > 100
    for key in arrays:
        assert np.array_equal(getattr(mine, key), getattr(theirs, key)), key


def test_returned_entries_are_not_changed_by_later_steps(play):
    env = HalfCheetah(2)
    step = env.reset()
    kept, copy = step, step.clone()
    play(env, step.clone(), actions_for(env, 3))
    env.reset()
    for key in ("observation", "is_init", "step_count", "episode_return"):
        assert torch.equal(kept[key], copy[key])


@pytest.mark.parametrize("key", ["num_envs", "episode_steps", "threads"])
def test_bad_options_name_the_key(key):
    with pytest.raises(ValueError, match=f"Reacher: {key} is 0; it must be at least 1"):
        Reacher(**{key: 0})


def test_bad_shapes_are_refused():
    env = HalfCheetah(2)
    with pytest.raises(ValueError, match=r"action has shape \(2, 5\); it must be \(2, 6\)"):
        env.advance(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="qvel has shape"):
        env.set_physics(np.zeros((2, 9)), np.zeros((1, 9)))


def test_the_base_is_not_an_environment():
    with pytest.raises(TypeError, match="abstract"):
        MuJoCo(1)


@pytest.mark.gpu
def test_entries_live_on_the_device(play):
    env = Hopper(3, device="cuda")
    following, _ = play(env, env.reset(), actions_for(env, 5))
    assert {value.device.type for value in following.values()} == {"cuda"}
