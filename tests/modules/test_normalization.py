"""Running statistics equal those of all data at once."""

import pytest
import torch

from lightning_hyper.modules import NoNorm, ReturnScale, RunningNorm


def test_running_norm_is_the_identity_before_it_saw_anything():
    x = torch.randn(5, 3)
    torch.testing.assert_close(RunningNorm(3)(x), x)


def test_running_norm_over_parts_equals_numbers_over_all():
    x = torch.randn(100, 7, 3) * torch.tensor([1.0, 5.0, 0.1]) + 4
    norm = RunningNorm(3)
    for part in x.split([10, 50, 40]):
        norm.update(part)
    flat = x.reshape(-1, 3).double()
    torch.testing.assert_close(norm.mean, flat.mean(0))
    torch.testing.assert_close(norm.variance, flat.var(0, unbiased=False))
    z = norm(x).reshape(-1, 3)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_statistics_are_in_the_state_dict():
    norm = RunningNorm(2)
    norm.update(torch.randn(50, 2))
    other = RunningNorm(2)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(norm(x), other(x))


def test_no_norm_leaves_everything_as_it_is():
    norm, x = NoNorm(), torch.randn(5, 3)
    norm.update(x + 9)
    assert norm(x) is x
    assert not norm.state_dict()


def stream(n=4, steps=12):
    done = torch.rand(n, steps, 1) < 0.2
    done[:, -1] = False
    return torch.randn(n, steps, 1) * 3, done


def returns_by_hand(reward, done, gamma):
    out = torch.zeros(reward.shape[:2], dtype=torch.float64)
    for n in range(len(reward)):
        running = 0.0
        for t in range(reward.shape[1]):
            running = gamma * running + reward[n, t, 0].item()
            out[n, t] = running
            running = 0.0 if done[n, t] else running
    return out


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    reward, done = stream()
    assert done.any()
    scaled = ReturnScale(0.9, clip=1e9)(reward, done)
    expected = reward.double() / returns_by_hand(reward, done, 0.9).std(unbiased=False)
    torch.testing.assert_close(scaled.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_return_runs_on_from_batch_to_batch():
    reward, done = stream()
    scale = ReturnScale(0.9, clip=1e9)
    for t in range(0, 12, 4):
        last = scale(reward[:, t : t + 4], done[:, t : t + 4])
    deviation = returns_by_hand(reward, done, 0.9).std(unbiased=False)
    torch.testing.assert_close(last.double(), reward[:, 8:].double() / deviation, atol=1e-6, rtol=1e-5)


def test_a_restored_scale_goes_on_exactly():
    reward, done = stream()
    scale, other = ReturnScale(0.9), ReturnScale(0.9)
    other.load_state(other.save_state())  # fresh
    scale(reward[:, :5], done[:, :5])
    other.load_state_dict(scale.state_dict())
    other.load_state(scale.save_state())
    assert torch.equal(scale(reward[:, 5:], done[:, 5:]), other(reward[:, 5:], done[:, 5:]))


def test_scaled_rewards_are_clipped():
    reward = torch.tensor([[[0.0]] * 999 + [[1e3]]])
    scaled = ReturnScale(0.0)(reward, torch.zeros_like(reward, dtype=torch.bool))
    assert scaled.max().item() == pytest.approx(10.0)
