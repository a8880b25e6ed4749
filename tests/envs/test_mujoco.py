"""The MuJoCo families follow gymnasium's own environments, step by step."""

import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

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
    return unit * env.action_spec.high.cpu() * scale


@pytest.mark.parametrize(("name", "features", "bound"), FAMILIES)
def test_specs_are_gymnasiums(name, features, bound):
    env, other = made(name, 3), reference(name)
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
    env.begin()
    others = [reference(name) for _ in range(3)]
    for row, other in enumerate(others):
        begin(other, env, row)
    # Simulators end at different frames from here on.
    env.advance(torch.zeros(env.action_spec.shape))
    env.begin(torch.tensor([True, False, False]))
    begin(others[0], env, 0)
    for other in others[1:]:
        other.step(np.zeros(other.model.nu))
    ends, seen = 0, []
    for action in actions_for(env, 300):
        following = env.advance(action)
        seen.append(following["observation"])
        over = following["done"].flatten()
        started = env.begin(over) if over.any() else following
        for row, other in enumerate(others):
            observation, reward, terminated, _, _ = other.step(action[row].double().numpy())
            np.testing.assert_allclose(following["observation"][row].numpy(), observation, rtol=1e-6, atol=1e-7)
            assert following["reward"][row].item() == pytest.approx(reward, rel=1e-6, abs=1e-7)
            assert following["terminated"][row].item() == terminated
            if over[row]:
                ends += 1
                begin(other, env, row)
                np.testing.assert_allclose(started["observation"][row].numpy(), other._get_obs(), rtol=1e-6, atol=1e-7)
    assert ends >= 3 * 6
    # Nothing agreed by standing still; forces have a test of their own.
    moving = torch.cat(seen).std(0) > 0
    assert moving[: {"Ant": 27, "InvertedDoublePendulum": 8}.get(name)].all()


@pytest.mark.parametrize(("name", "lowest", "start"), [("Ant", 27, -0.3), ("InvertedDoublePendulum", 8, 0.98)])
def test_forces_of_contact_are_gymnasiums(name, lowest, start):
    """Ant lands on the floor; the cart runs into the end of its rail."""
    env, other = made(name, 1), reference(name)
    env.begin()
    begin(other, env, 0)
    qpos, qvel = env.models[0].qpos0.copy()[None], np.zeros((1, other.model.nv))
    qpos[0, 2 if name == "Ant" else 0] += start
    qvel[0, 0] = 2
    env.set_physics(qpos, qvel)
    other.set_state(qpos[0], qvel[0])
    forces = []
    for action in actions_for(env, 30)[:, 0].numpy():
        observation, reward, _ = env.simulate(torch.from_numpy(action[None]))
        expected = other.step(action)
        np.testing.assert_allclose(observation[0], expected[0], rtol=1e-6, atol=1e-7)
        assert reward[0] == pytest.approx(expected[1], rel=1e-6)
        forces.append(np.abs(expected[0][lowest:]).max())
    assert max(forces) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_set_physics_is_gymnasiums_set_state(name):
    env, other = made(name, 2), reference(name)
    env.begin()
    begin(other, env, 1)
    rng = np.random.default_rng(0)
    first, second = rng.uniform(-1, 1, (2, 2, other.model.nu))
    qpos = env.models[0].qpos0 + rng.uniform(-0.05, 0.05, (2, other.model.nq))
    qvel = rng.normal(size=(2, other.model.nv))
    for action in (first, second):
        observation, reward, terminated = env.simulate(torch.from_numpy(action))
        expected = other.step(action[1])
        np.testing.assert_allclose(observation[1], expected[0], rtol=1e-6, atol=1e-7)
        assert (reward[1], terminated[1]) == (pytest.approx(expected[1], rel=1e-6), expected[2])
        env.set_physics(qpos, qvel)
        other.set_state(qpos[1], qvel[1])
        np.testing.assert_allclose(env.observe()[1], other._get_obs())


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


def test_truncation_at_the_limit_is_no_termination(play):
    env = HalfCheetah(2, episode_steps=5)
    env.begin()
    following = play(env, actions_for(env, 10))
    assert following["truncated"][:, 0, 0].tolist() == ([False] * 4 + [True]) * 2
    assert torch.equal(following["done"], following["truncated"])
    assert not following["terminated"].any()


def test_termination_at_the_limit_is_no_truncation():
    env = Hopper(1, episode_steps=1)
    env.begin()
    env.set_physics(env.qpos() - np.array([0, 1.0, 0, 0, 0, 0]), env.now["qvel"])
    following = env.advance(torch.zeros(1, 3))
    assert [following[key].item() for key in ("done", "terminated", "truncated")] == [True, True, False]


def test_beginning_some_leaves_the_other_simulators_alone(play):
    env = Ant(4)
    env.set_seed(0)
    env.begin()
    play(env, actions_for(env, 20))
    before = {name: array.copy() for name, array in env.now.items()}
    env.begin(torch.tensor([False, True, False, True]))
    for name, array in env.now.items():
        assert np.array_equal(array[[0, 2]], before[name][[0, 2]])
        assert not np.array_equal(array[[1, 3]], before[name][[1, 3]])


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_object_continues_bit_for_bit(play, continues, name):
    env, other = (made(name, 3, episode_steps=40) for _ in range(2))
    env.set_seed(0)
    env.begin()
    actions = actions_for(env, 100)
    play(env, actions[:25])
    state = env.save_state()
    assert state["simulators"].dtype == torch.float64
    other.load_state(state)
    # Without the solver's start only last bits would differ, and only after many frames.
    for (_, mine), (_, theirs) in zip(env._simulators, other._simulators, strict=True):
        assert np.array_equal(mine.qacc_warmstart, theirs.qacc_warmstart)
    continues(env, other, actions[25:], 3)


@pytest.mark.parametrize("name", ["HalfCheetah", "Ant", "Hopper"])
def test_threads_change_nothing(play, name):
    found = []
    for threads in (1, 2, 3):
        env = made(name, 7, episode_steps=30, threads=threads)
        env.set_seed(0)
        env.begin()
        found.append(play(env, actions_for(env, 50)))
    for other in found[1:]:
        for key, entry in found[0].items():
            assert torch.equal(entry, other[key]), key


def test_environments_of_a_batch_start_apart():
    assert len(Hopper(4).begin()["observation"].unique(dim=0)) == 4


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


def test_bad_shapes_are_refused():
    env = HalfCheetah(2)
    with pytest.raises(ValueError, match=r"action has shape \(2, 5\); it must be \(2, 6\)"):
        env.simulate(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="qvel has shape"):
        env.set_physics(np.zeros((2, 9)), np.zeros((1, 9)))


def test_the_base_is_not_an_environment():
    with pytest.raises(TypeError, match="abstract"):
        MuJoCo(1)


@pytest.mark.gpu
def test_entries_live_on_the_device(play):
    env = Hopper(3, device="cuda")
    env.begin()
    following = play(env, actions_for(env, 5).cuda())
    assert {value.device.type for value in following.values()} == {"cuda"}
