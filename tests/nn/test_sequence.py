"""Sequence encoders: stepping equals the window, with memory beginning afresh inside."""

from functools import partial

import pytest
import torch

from lightning_hyper.nn import GRU, LSTM, Transformer

ENCODERS = {
    "gru": partial(GRU, hidden=8),
    "gru2": partial(GRU, hidden=8, layers=2),
    "lstm": partial(LSTM, hidden=8, layers=2),
    "transformer": partial(Transformer, width=16, heads=2, memory=5),
}


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request):
    return ENCODERS[request.param](3)


def stepped(encoder, x, reset):
    state, features = None, []
    for t in range(x.shape[1]):
        y, state = encoder(x[:, t : t + 1], state, reset[:, t : t + 1])
        features.append(y)
    return torch.cat(features, 1), state


def test_stepping_equals_the_window(encoder):
    x, reset = torch.randn(4, 30, 3), torch.rand(4, 30) < 0.1
    features, state = encoder(x, None, reset)
    one_by_one, after = stepped(encoder, x, reset)
    torch.testing.assert_close(features, one_by_one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, after, atol=1e-5, rtol=1e-4)
    assert features.shape == (4, 30, encoder.out_features)
    assert state.shape == (4, encoder.state_features)


def test_windows_in_a_row_equal_one(encoder):
    x, reset = torch.randn(4, 30, 3), torch.rand(4, 30) < 0.1
    whole, _ = encoder(x, None, reset)
    first, state = encoder(x[:, :13], None, reset[:, :13])
    second, _ = encoder(x[:, 13:], state, reset[:, 13:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-4)


def test_after_a_reset_nothing_of_before_is_left(encoder):
    x, reset = torch.randn(2, 12, 3), torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = True
    y = x.clone()
    y[:, :6] += 1
    a, b = encoder(x, None, reset)[0], encoder(y, None, reset)[0]
    assert torch.equal(a[0, 6:], b[0, 6:])
    assert not torch.allclose(a[1, 6:10], b[1, 6:10])


def test_features_never_see_the_future(encoder):
    x = torch.randn(2, 12, 3)
    y = x.clone()
    y[:, 7:] += 1
    torch.testing.assert_close(encoder(x)[0][:, :7], encoder(y)[0][:, :7])


def test_gradients_flow_through_the_window(encoder):
    x = torch.randn(2, 12, 3, requires_grad=True)
    features = encoder(x)[0][:, 4]
    (features * torch.randn_like(features)).sum().backward()
    assert x.grad[:, 1:5].abs().amin((0, 2)).gt(0).all()
    assert not x.grad[:, 5:].any()


def test_gru_equals_its_formula():
    encoder = GRU(3, hidden=4)
    rnn, x, h = encoder.rnn, torch.randn(2, 6, 3), torch.randn(2, 4)
    features, _ = encoder(x, h)
    for t in range(6):
        i = (x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0).chunk(3, -1)
        g = (h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0).chunk(3, -1)
        r, z = torch.sigmoid(i[0] + g[0]), torch.sigmoid(i[1] + g[1])
        h = (1 - z) * torch.tanh(i[2] + r * g[2]) + z * h
        torch.testing.assert_close(features[:, t], h, atol=1e-6, rtol=1e-5)


def test_recurrent_weights_begin_orthogonal_and_biases_zero():
    rnn = GRU(3, hidden=8).rnn
    weight = rnn.weight_hh_l0
    torch.testing.assert_close(weight.T @ weight, torch.eye(8), atol=1e-5, rtol=0)
    assert not rnn.bias_hh_l0.any()


def test_transformer_sees_its_memory_and_no_further():
    encoder = Transformer(3, width=16, heads=2, memory=5)
    x = torch.randn(1, 12, 3)
    for back, seen in ((4, True), (5, False)):
        y = x.clone()
        y[:, 11 - back] += 1
        changed = not torch.allclose(encoder(x)[0][:, 11], encoder(y)[0][:, 11])
        assert changed is seen


def test_bad_sizes_name_the_key():
    with pytest.raises(ValueError, match=r"encoder\.width"):
        Transformer(3, width=10, heads=4)
    with pytest.raises(ValueError, match="hidden is 0"):
        GRU(3, hidden=0)


@pytest.mark.gpu
def test_gpu_equals_cpu(encoder):
    x, reset = torch.randn(4, 30, 3), torch.rand(4, 30) < 0.1
    expected = encoder(x, None, reset)[0]
    found = encoder.cuda()(x.cuda(), None, reset.cuda())[0]
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
