"""The input x of the networks: the observation, standardised and encoded, with the flag of trials."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import ObservationEncoder
from lightning_hyper.nn import GridEncoder, VectorEncoder

PLAIN, TRIALS = Spaces((3,), 5, True), Spaces((3,), 5, True, trials=True)
IMAGES = Spaces((7, 7, 3), 5, True)
GRID = partial(GridEncoder, channels=(4, 4, 6))


def window(*lead, shape=(3,)):
    is_image = len(shape) > 1
    seen = torch.randint(9, (*lead, *shape), dtype=torch.uint8) if is_image else torch.randn(*lead, *shape) * 4 + 2
    return {"observation": seen, "episode_done": (torch.rand(*lead, 1) < 0.3).float()}


@pytest.mark.parametrize("lead", [(4,), (4, 6)])
def test_vectors_stay_as_they_are_without_an_encoder(lead):
    data = window(*lead)
    plain, trials = ObservationEncoder(PLAIN), ObservationEncoder(TRIALS)
    assert torch.equal(plain(data), data["observation"])
    assert torch.equal(trials(data), torch.cat([data["observation"], data["episode_done"]], -1))
    assert (plain.out_features, trials.out_features) == (3, 4)
    assert (plain.in_keys, trials.in_keys) == (["observation"], ["observation", "episode_done"])


def test_vectors_are_standardised_by_what_was_taken_in_and_then_encoded():
    made = ObservationEncoder(TRIALS, partial(VectorEncoder, widths=(5,)), normalize=True)
    data = window(40, 6)
    torch.testing.assert_close(made(data), made.encoder(torch.cat([data["observation"], data["episode_done"]], -1)))
    made.update_statistics(data)
    flat = torch.cat([data["observation"], data["episode_done"]], -1).flatten(0, 1)
    x = (flat - flat.mean(0)) / flat.std(0, unbiased=False)
    (layer,) = [m for m in made.encoder.modules() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(made(data).flatten(0, 1), layer(x).tanh(), atol=1e-5, rtol=1e-4)
    assert made.out_features == 5


def test_without_it_statistics_are_left_alone():
    made = ObservationEncoder(PLAIN)
    data = window(40, 6)
    made.update_statistics(data)
    assert torch.equal(made(data), data["observation"])
    assert not made.state_dict()


def test_images_are_encoded_and_the_flag_lies_beside():
    made = ObservationEncoder(Spaces((7, 7, 3), 5, True, trials=True), GRID)
    data = window(4, 6, shape=(7, 7, 3))
    made.update_statistics(data)
    x = made(data)
    assert x.shape == (4, 6, made.out_features) == (4, 6, 7)
    for row in range(4):
        torch.testing.assert_close(x[row, :, :-1], made.encoder(data["observation"][row]))
    assert torch.equal(x[..., -1:], data["episode_done"])


def test_a_users_own_encoder_need_not_say_its_features():
    class Sums(nn.Module):
        def __init__(self, shape):
            super().__init__()

        def forward(self, x):
            return torch.stack([x.sum(-1), x.prod(-1)], -1)

    made = ObservationEncoder(PLAIN, Sums)
    assert made.out_features == 2
    assert made(window(4, 6)).shape == (4, 6, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ObservationEncoder, IMAGES), r"data.env shows images \(7, 7, 3\), which need model.encoder"),
        (partial(ObservationEncoder, IMAGES, GRID, normalize=True), r"set model.normalize_observation to false"),
        (partial(ObservationEncoder, PLAIN, GRID), r"model.encoder: observations are \(3,\); GridEncoder"),
    ],
)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
