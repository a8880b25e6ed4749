"""Sequence encoders: stepping equals the window, with memory beginning afresh anywhere inside."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from lightning_hyper.checks import RecipeError
from lightning_hyper.nn import GRU, LSTM, Transformer

ENCODERS = {
    "gru": partial(GRU, hidden=8),
    "gru2": partial(GRU, hidden=8, layers=2),
    "lstm": partial(LSTM, hidden=8),
    "lstm2": partial(LSTM, hidden=8, layers=2),
    "transformer": partial(Transformer, width=16, heads=2, memory=5),
    "transformer_of_one": partial(Transformer, width=16, heads=2, memory=1, layers=1),
    "transformer_of_all": partial(Transformer, width=16, heads=2, memory=40),
}
SHARES = [0.0, 0.15, 0.5, 1.0]


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request):
    return shaken(ENCODERS[request.param](3))


def shaken(encoder):
    """Biases of recurrent layers begin at zero, where an error in them would not show."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def drawn(share, rows=4, steps=30):
    return torch.randn(rows, steps, 3), torch.rand(rows, steps) < share


def stepped(encoder, x, reset, state=None):
    features = []
    for t in range(x.shape[1]):
        y, state = encoder(x[:, t : t + 1], state, reset[:, t : t + 1])
        features.append(y)
    return torch.cat(features, 1), state


def memory_of(encoder, rows=4):
    """A state after some steps with resets."""
    x, reset = drawn(0.1, rows)
    return encoder(x, None, reset)[1]


def close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", SHARES)
def test_stepping_equals_the_window(encoder, share):
    x, reset = drawn(share)
    before = memory_of(encoder).detach()
    for state in (None, before):
        found = encoder(x, state, reset)
        close(found, stepped(encoder, x, reset, state))
        with torch.no_grad():
            close(found, stepped(encoder, x, reset, state))
    assert found[0].shape == (4, 30, encoder.out_features)
    assert found[1].shape == (4, encoder.state_features)


def test_no_resets_are_resets_nowhere(encoder):
    x, nowhere = drawn(0.0)
    close(encoder(x), encoder(x, None, nowhere))


@pytest.mark.parametrize("share", SHARES)
def test_windows_in_a_row_equal_one(encoder, share):
    x, reset = drawn(share)
    whole, last = encoder(x, None, reset)
    cuts = [0, *sorted((torch.randperm(29)[:4] + 1).tolist()), 30]
    features, state = [], None
    for start, end in pairwise(cuts):
        y, state = encoder(x[:, start:end], state, reset[:, start:end])
        features.append(y)
    close((torch.cat(features, 1), state), (whole, last))


def test_a_state_of_zeros_is_fresh(encoder):
    x, reset = drawn(0.1)
    zeros = torch.zeros(4, encoder.state_features)
    for one, other in zip(encoder(x, None, reset), encoder(x, zeros, reset), strict=True):
        assert torch.equal(one, other)


def test_after_a_reset_nothing_of_before_is_left(encoder):
    x, reset = drawn(0.0, rows=2, steps=12)
    reset[0, 6] = True
    y, state = x.clone(), memory_of(encoder, 2)
    y[:, :6] += 1
    a, b = encoder(x, None, reset)[0], encoder(y, state, reset)[0]
    assert torch.equal(a[0, 6:], b[0, 6:])
    if encoder.state_features:
        assert not torch.allclose(a[1, 6:10], b[1, 6:10])


def test_no_gradient_flows_over_a_reset(encoder):
    x, reset = drawn(0.0, rows=2, steps=12)
    reset[0, 6] = True
    x.requires_grad_()
    state = torch.rand(2, encoder.state_features).round().requires_grad_()
    encoder(x, state, reset)[0][:, 7].square().sum().backward()
    assert not x.grad[0, :6].any()
    assert not state.grad[0].any()
    assert x.grad[0, 7].any()
    if encoder.state_features:
        assert x.grad[0, 6].any()
        assert x.grad[1, 5].any()


def test_features_never_see_the_future(encoder):
    x = torch.randn(2, 12, 3)
    y = x.clone()
    y[:, 7:] += 1
    torch.testing.assert_close(encoder(x)[0][:, :7], encoder(y)[0][:, :7])


@pytest.mark.parametrize("share", SHARES)
def test_gradients_of_the_window_are_those_of_stepping(encoder, share):
    x, reset = drawn(share, steps=10)
    x.requires_grad_()
    state = memory_of(encoder).detach().requires_grad_()
    weights = torch.randn(4, 10, encoder.out_features), torch.randn(4, encoder.state_features)
    grads = []
    for run in (encoder, partial(stepped, encoder)):
        features, after = run(x, state=state, reset=reset)
        loss = (features * weights[0]).sum() + (after * weights[1]).sum()
        grads.append(torch.autograd.grad(loss, [x, state, *encoder.parameters()], allow_unused=True))
    for one, other in zip(*grads, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gru", "gru2"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_grus_gradient_is_right_to_the_last_digits(name, share):
    encoder = shaken(ENCODERS[name](3)).double()
    x, reset = torch.randn(3, 5, 3, dtype=torch.double, requires_grad=True), torch.rand(3, 5) < share
    state = torch.randn(3, encoder.state_features, dtype=torch.double, requires_grad=True)
    parameters = list(encoder.parameters())

    def run(*inputs):
        return encoder(inputs[0], inputs[1], reset)

    assert torch.autograd.gradcheck(run, (x, state, *parameters))


@pytest.mark.parametrize("name", ["gru", "gru2", "lstm", "lstm2"])
def test_without_resets_it_is_pytorchs_layer(name):
    encoder = shaken(ENCODERS[name](3))
    x = torch.randn(4, 12, 3, requires_grad=True)
    mine, theirs = encoder(x)[0], encoder.rnn(x.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(mine)
    wanted = [x, *encoder.parameters()]
    close(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (mine, theirs)))


@pytest.mark.parametrize("name", ["gru", "gru2", "lstm", "lstm2"])
@pytest.mark.parametrize("share", SHARES)
def test_packed_segments_give_what_the_cpu_does(name, share):
    encoder = shaken(ENCODERS[name](3))
    x, reset = drawn(share)
    state = torch.randn(4, encoder.state_features)
    close(encoder._packed(x, state, reset), encoder(x, state, reset))
    close(encoder._packed(x, state, None), encoder(x, state))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_state_keeps_its_dtype_and_autocast_changes_little(name):
    encoder = shaken(ENCODERS[name](3))
    x, reset = drawn(0.1)
    expected = encoder(x, None, reset)
    with torch.autocast("cpu", torch.bfloat16):
        for steps in (30, 1):
            features, state = encoder(x[:, :steps].bfloat16(), None, reset[:, :steps])
            assert state.dtype == torch.float32
            torch.testing.assert_close(features.float(), expected[0][:, :steps], atol=0.1, rtol=0.1)
            assert encoder(x, state.bfloat16(), reset)[1].dtype == torch.bfloat16
    features.float().sum().backward()


def test_gru_equals_its_formula():
    encoder = shaken(GRU(3, hidden=4))
    rnn, x, h = encoder.rnn, torch.randn(2, 6, 3), torch.randn(2, 4)
    features, _ = encoder(x, h)
    for t in range(6):
        i = (x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0).chunk(3, -1)
        g = (h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0).chunk(3, -1)
        r, z = torch.sigmoid(i[0] + g[0]), torch.sigmoid(i[1] + g[1])
        h = (1 - z) * torch.tanh(i[2] + r * g[2]) + z * h
        torch.testing.assert_close(features[:, t], h, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [GRU, LSTM])
def test_recurrent_weights_begin_orthogonal_and_biases_zero(kind):
    rnn = kind(3, hidden=8).rnn
    weight = rnn.weight_hh_l0
    torch.testing.assert_close(weight.T @ weight, torch.eye(8), atol=1e-5, rtol=0)
    assert not rnn.bias_hh_l0.any()
    assert not rnn.bias_ih_l0.any()


def attended(x, qkv, out, heads, memory):
    """Causal attention of one row `[T, width]` with rotary positions, written out step by step."""
    steps, width = x.shape
    size = width // heads
    q, k, v = (part.view(steps, heads, size) for part in qkv(x).chunk(3, -1))
    rates = 10_000.0 ** (-torch.arange(0, size, 2) / size)

    def turned(u, t):
        a, b = u[0::2], u[1::2]
        cos, sin = torch.cos(t * rates), torch.sin(t * rates)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten()

    rows = []
    for t in range(steps):
        past = range(max(0, t - memory + 1), t + 1)
        mixed = []
        for h in range(heads):
            scores = torch.stack([turned(q[t, h], t) @ turned(k[s, h], s) for s in past]) / size**0.5
            mixed.append(torch.softmax(scores, 0) @ torch.stack([v[s, h] for s in past]))
        rows.append(torch.cat(mixed))
    return out(torch.stack(rows))


def test_transformer_equals_its_formula():
    encoder = shaken(Transformer(3, width=16, heads=2, memory=4))
    x = torch.randn(1, 9, 3)
    y = encoder.embed(x[0])
    for block in encoder.blocks:
        y = y + attended(block.before(y), block.qkv, block.out, 2, 4)
        y = y + block.feed(block.between(y))
    torch.testing.assert_close(encoder(x)[0][0], encoder.norm(y), atol=1e-5, rtol=1e-4)


def test_a_transformer_block_sees_its_memory_and_no_further():
    for layers, reach in ((1, 4), (2, 8)):
        encoder = Transformer(3, width=16, heads=2, memory=5, layers=layers)
        x = torch.randn(1, 12, 3)
        for back, seen in ((reach, True), (reach + 1, False)):
            y = x.clone()
            y[:, 11 - back] += 1
            changed = not torch.equal(encoder(x)[0][:, 11], encoder(y)[0][:, 11])
            assert changed is seen


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Transformer(3, width=10, heads=4), r"width is 10"),
        (lambda: Transformer(3, memory=0), r"memory is 0"),
        (lambda: Transformer(3, layers=0), r"layers is 0"),
        (lambda: GRU(3, hidden=0), r"hidden is 0"),
        (lambda: LSTM(3, layers=0), r"layers is 0"),
    ],
)
def test_bad_sizes_name_the_key(make, key):
    with pytest.raises(RecipeError, match=key):
        make()


@pytest.mark.gpu
def test_gpu_equals_cpu(encoder):
    x, reset = drawn(0.1)
    expected = encoder(x, None, reset)
    found = encoder.cuda()(x.cuda(), None, reset.cuda())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-3, rtol=1e-3)
