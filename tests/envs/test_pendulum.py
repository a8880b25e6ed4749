"""The pendulum follows gymnasium's own, step by step."""

import gymnasium
import numpy as np
import pytest
import torch

from lightning_hyper.envs import Pendulum


def torques_for(env, steps, bound=2.0):
    unit = torch.rand(steps, *env.action_spec.shape, generator=torch.Generator().manual_seed(0))
    return (unit * 2 - 1) * bound


def test_limits_are_gymnasiums():
    env = Pendulum(3)
    assert env.seconds == gymnasium.make("Pendulum-v1").unwrapped.dt
    assert env.horizon == gymnasium.spec("Pendulum-v1").max_episode_steps
    assert env.action_spec.low.min() == -2


def test_every_step_equals_gymnasiums_through_resets():
    env = Pendulum(3, episode_steps=60)
    env.set_seed(0)
    env.begin()
    others = [gymnasium.make("Pendulum-v1").unwrapped for _ in range(3)]

    def begin(row):
        others[row].state = np.array([env.qpos()[row].item(), env.save_state()["qvel"][row].item()])

    for row in range(3):
        begin(row)
    # Episodes end at different frames from here on.
    env.begin(torch.tensor([True, False, False]))
    begin(0)
    # Torques beyond the bounds are clipped by both.
    for torque in torques_for(env, 300, bound=3.0):
        following = env.advance(torque)
        over = following["done"].flatten()
        step = env.begin(over) if over.any() else following
        for row, other in enumerate(others):
            observation, reward, _, _, _ = other.step(torque[row].double().numpy())
            np.testing.assert_allclose(following["observation"][row].numpy(), observation, rtol=1e-6, atol=1e-6)
            assert following["reward"][row].item() == pytest.approx(reward, rel=1e-6, abs=1e-6)
            if over[row]:
                begin(row)
                np.testing.assert_allclose(step["observation"][row].numpy(), other._get_obs(), rtol=1e-6, atol=1e-7)


def test_resets_are_uniform_within_gymnasiums_bounds():
    env = Pendulum(20_000)
    env.set_seed(0)
    env.begin()
    for drawn, bound in ((env.qpos(), np.pi), (env.save_state()["qvel"], 1.0)):
        share = drawn[:, 0] / bound
        assert 0.999 < share.abs().max() <= 1
        np.testing.assert_allclose(share.sort().values.numpy(), np.linspace(-1, 1, 20_000), atol=0.04)


def test_truncation_at_the_limit_is_no_termination(play):
    env = Pendulum(2, episode_steps=4)
    env.begin()
    following = play(env, torques_for(env, 8))
    assert following["truncated"][:, 0, 0].tolist() == [False, False, False, True] * 2
    assert torch.equal(following["done"], following["truncated"])
    assert not following["terminated"].any()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="qpos has shape"):
        Pendulum(2).set_physics(torch.zeros(1, 1), torch.zeros(2, 1))


@pytest.mark.gpu
def test_gpu_steps_equal_cpu_steps(play):
    cpu, gpu = Pendulum(16), Pendulum(16, device="cuda")
    cpu.begin()
    gpu.load_state({**cpu.save_state(), "generator": gpu.save_state()["generator"]})
    torques = torques_for(cpu, 50)
    expected, found = play(cpu, torques), play(gpu, torques.cuda())
    torch.testing.assert_close(found["observation"].cpu(), expected["observation"])
