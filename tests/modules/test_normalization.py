"""Running statistics equal those of all data at once."""

import pytest
import torch

from lightning_hyper.modules import ReturnScale, RunningNorm


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


def test_return_scale_divides_by_the_deviation_of_the_discounted_return():
    reward, done = torch.randn(4, 6, 1), torch.zeros(4, 6, 1, dtype=torch.bool)
    done[1, 2] = True
    returns = torch.zeros(4, 6)
    for n in range(4):
        running = 0.0
        for t in range(6):
            running = 0.9 * running + reward[n, t, 0]
            returns[n, t] = running
            if done[n, t]:
                running = 0.0
    scaled = ReturnScale(0.9, clip=1e9)(reward, done)
    torch.testing.assert_close(scaled, reward / returns.std(unbiased=False))


def test_return_scale_clips():
    reward = torch.tensor([[[0.0]] * 999 + [[1e3]]])
    scaled = ReturnScale(0.0)(reward, torch.zeros_like(reward, dtype=torch.bool))
    assert scaled.max().item() == pytest.approx(10.0)


def test_statistics_are_in_the_state_dict():
    norm = RunningNorm(2)
    norm.update(torch.randn(50, 2))
    other = RunningNorm(2)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(norm(x), other(x))
