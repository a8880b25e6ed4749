"""The pendulum follows gymnasium's own, step by step."""

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from lightning_hyper.envs import Pendulum


def torques_for(env, steps, bound=2.0):
    unit = torch.rand(steps, *env.action_spec.shape, generator=torch.Generator().manual_seed(0))
    return (unit * 2 - 1) * bound


def test_specs_hold():
    env = Pendulum(3)
    check_env_specs(env)
    assert env.horizon == gymnasium.spec("Pendulum-v1").max_episode_steps
    assert env.action_spec.low.min() == -2


def test_every_step_equals_gymnasiums_through_resets():
    env = Pendulum(3, episode_steps=60)
    env.set_seed(0)
    step = env.reset()
    step["_reset"] = torch.tensor([[True], [False], [False]])
    others = [gymnasium.make("Pendulum-v1").unwrapped for _ in range(3)]

    def begin(row):
        others[row].state = np.array([env.qpos()[row].item(), env.save_state()["qvel"][row].item()])

    for row in range(3):
        begin(row)
    # Torques beyond the bounds are clipped by both.
    for torque in torques_for(env, 300, bound=3.0):
        step["action"] = torque
        full, step = env.step_and_maybe_reset(step)
        for row, other in enumerate(others):
            observation, reward, _, _, _ = other.step(torque[row].double().numpy())
            np.testing.assert_allclose(full["next", "observation"][row].numpy(), observation, rtol=1e-6, atol=1e-6)
            assert full["next", "reward"][row].item() == pytest.approx(reward, rel=1e-6, abs=1e-6)
            if full["next", "done"][row]:
                begin(row)
                np.testing.assert_allclose(step["observation"][row].numpy(), other._get_obs(), rtol=1e-6, atol=1e-7)


def test_resets_are_uniform_within_gymnasiums_bounds():
    env = Pendulum(20_000)
    env.set_seed(0)
    env.reset()
    for drawn, bound in ((env.qpos(), np.pi), (env.save_state()["qvel"], 1.0)):
        share = drawn[:, 0] / bound
        assert 0.999 < share.abs().max() <= 1
        np.testing.assert_allclose(share.sort().values.numpy(), np.linspace(-1, 1, 20_000), atol=0.04)


def test_truncation_at_the_limit_is_no_termination():
    batch = Pendulum(2, episode_steps=4).rollout(8, break_when_any_done=False)
    assert batch["next", "truncated"][0, :, 0].tolist() == [False, False, False, True] * 2
    assert torch.equal(batch["next", "done"], batch["next", "truncated"])
    assert not batch["next", "terminated"].any()
    returned = batch["next", "reward"].view(2, 2, 4).sum(-1)
    torch.testing.assert_close(batch["next", "episode_return"].view(2, 2, 4)[..., -1], returned)


def test_partial_reset_leaves_the_others_alone(play):
    env = Pendulum(3)
    env.set_seed(0)
    following, step = play(env, env.reset(), torques_for(env, 5))
    step["_reset"] = torch.tensor([[False], [True], [False]])
    after = env.reset(step.clone())
    for key in ("observation", "step_count", "episode_return", "is_init", "done"):
        assert torch.equal(after[key][[0, 2]], following[-1][key][[0, 2]])
    assert not torch.equal(after["observation"][1], following[-1]["observation"][1])
    assert after["step_count"].squeeze(-1).tolist() == [5, 0, 5]
    assert after["is_init"].squeeze(-1).tolist() == [False, True, False]


def test_a_fresh_object_continues_bit_for_bit(play):
    env = Pendulum(3, episode_steps=40)
    env.set_seed(0)
    torques = torques_for(env, 100)
    _, step = play(env, env.reset(), torques[:25])
    state, start = env.save_state(), step.clone()
    expected, _ = play(env, step, torques[25:])
    other = Pendulum(3, episode_steps=40)
    other.load_state(state)
    found, _ = play(other, start, torques[25:])
    for key in ("observation", "reward", "truncated", "step_count", "episode_return"):
        assert torch.equal(found[key], expected[key])


def test_seeds_reproduce():
    env = Pendulum(4)
    starts = []
    for seed in (3, 3, 4):
        env.set_seed(seed)
        starts.append(env.reset()["observation"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("key", ["num_envs", "episode_steps"])
def test_bad_options_name_the_key(key):
    with pytest.raises(ValueError, match=f"Pendulum: {key} is 0; it must be at least 1"):
        Pendulum(**{key: 0})


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="qpos has shape"):
        Pendulum(2).set_physics(torch.zeros(1, 1), torch.zeros(2, 1))


@pytest.mark.gpu
def test_gpu_steps_equal_cpu_steps(play):
    cpu, gpu = Pendulum(16), Pendulum(16, device="cuda")
    start = cpu.reset()
    gpu.load_state({**gpu.save_state(), **{k: v for k, v in cpu.save_state().items() if k != "generator"}})
    torques = torques_for(cpu, 50)
    expected, _ = play(cpu, start, torques)
    found, _ = play(gpu, start.to("cuda"), torques.cuda())
    torch.testing.assert_close(found["observation"].cpu(), expected["observation"])
