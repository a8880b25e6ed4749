"""Contexts of a trial so far, and of a task that is a vector: what enters, and when memory begins afresh."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import (
    ConstantContext,
    Contexts,
    ContextSource,
    JoinedContext,
    OneHotContext,
    RecurrentContext,
    TaskContext,
    TextContext,
)
from lightning_hyper.modules.context import FEATURES
from lightning_hyper.modules.joined_context import make_context
from lightning_hyper.nn import GRU, LSTM, Transformer

SPACES = Spaces((2,), 4, True, trials=True, task=3)
INDEXED = Spaces(
    (2,), 4, True, trials=True, tasks=("a", "b"),
    missions=(("get to the green goal square",), ("open the red door then the blue door",)),
)  # fmt: skip
SMALL = partial(RecurrentContext, encoder=partial(GRU, hidden=6), observation_embedding=5, action_embedding=4)


def window(n=3, steps=10, init=((0, 0), (1, 0), (2, 0))):
    """Steps `[n, steps]` of an environment that shows everything."""
    is_init = torch.zeros(n, steps, 1, dtype=torch.bool)
    for row, t in init:
        is_init[row, t] = True
    which = torch.randint(2, (n, 1)).expand(n, steps)
    return {
        "observation": torch.randn(n, steps, 2),
        FEATURES: torch.randn(n, steps, 7),
        "episode_done": (torch.rand(n, steps, 1) < 0.2).float(),
        "previous_action": torch.randint(4, (n, steps)),
        "previous_reward": torch.randn(n, steps, 1),
        "is_init": is_init,
        "task": torch.randn(n, steps, 3),
        "mission": which,
    }


def indexed(data):
    return {**data, "task": data["mission"]}


def changed(data, key, where, by=5):
    entry = data[key].clone()
    entry[where] += by
    return {**data, key: entry}


def part(data, start, end):
    return {key: entry[:, start:end] for key, entry in data.items()}


def codes(source, data, state=None, **options):
    return source(data, state, **options)[0].each()


def shaken(source):
    """All parameters random, so that none happens to be zero."""
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.5)
    return source


SOURCES = {
    "gru": (SPACES, SMALL),
    "lstm": (SPACES, partial(RecurrentContext, encoder=partial(LSTM, hidden=6), code=2)),
    "transformer": (SPACES, partial(RecurrentContext, encoder=partial(Transformer, width=8, heads=2, memory=6))),
    "gru zero": (SPACES, partial(SMALL, first_step="zero", code=3)),
    "lstm zero": (SPACES, partial(RecurrentContext, encoder=partial(LSTM, hidden=6), first_step="zero")),
    "encoded": (SPACES, partial(SMALL, encoded=True)),
    "task": (SPACES, TaskContext),
    "constant": (SPACES, ConstantContext),
    "one-hot": (INDEXED, partial(OneHotContext, outputs=5)),
    "text": (INDEXED, TextContext),
    "joined states": (SPACES, partial(JoinedContext, parts=[SMALL, TaskContext, partial(SMALL, code=2)])),
    "joined index": (INDEXED, partial(JoinedContext, parts=[OneHotContext, TextContext])),
    "joined both": (INDEXED, partial(JoinedContext, parts=[OneHotContext, ConstantContext, SMALL])),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_window_equals_stepping_it_with_resets_inside(name):
    spaces, make = SOURCES[name]
    source = shaken(make(spaces, 7))
    data = window(init=((0, 0), (1, 0), (2, 0), (1, 4), (2, 5), (2, 6)))
    data = indexed(data) if spaces is INDEXED else data
    whole, after = source(data, None)
    state, steps = None, []
    for t in range(10):
        contexts, state = source(part(data, t, t + 1), state)
        steps.append(contexts.each())
    assert whole.each().shape == (3, 10, source.out_features)
    torch.testing.assert_close(torch.cat(steps, 1), whole.each(), atol=1e-5, rtol=1e-4)
    assert (after is None) == (source.state_features == 0)
    if after is not None:
        assert after.shape == (3, source.state_features)
        torch.testing.assert_close(state, after, atol=1e-5, rtol=1e-4)


def reference_codes(source, data, *, zero=False):
    """Codes of a GRU context from PyTorch's cell, one environment and one step at a time."""
    seen, action, reward = (source.embeddings[name].layers[0] for name in ("observation", "action", "reward"))
    rnn, rows = source.encoder.rnn, []
    cell = nn.GRUCell(rnn.input_size, rnn.hidden_size)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in rnn.state_dict().items()})
    for row in range(len(data["is_init"])):
        h, steps = torch.zeros(rnn.hidden_size), []
        for t in range(data["is_init"].shape[1]):
            first = bool(data["is_init"][row, t])
            one_hot = torch.zeros(4)
            if first:
                h = torch.zeros_like(h)
            else:
                one_hot[data["previous_action"][row, t]] = 1
            flagged = torch.cat([data["observation"][row, t], data["episode_done"][row, t]])
            x = torch.cat([seen(flagged), action(one_hot), reward(data["previous_reward"][row, t])]).relu()
            if not (zero and first):
                h = cell(x.unsqueeze(0), h.unsqueeze(0)).squeeze(0)
            steps.append(source.code(h))
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def test_codes_are_those_of_a_gru_over_embedded_observation_action_and_reward():
    source = shaken(SMALL(SPACES, 7, code=3))
    data = window(init=((0, 0), (1, 0), (2, 0), (1, 4), (2, 9)))
    torch.testing.assert_close(codes(source, data), reference_codes(source, data))


def test_under_zero_later_codes_begin_from_the_zero_state():
    source = shaken(SMALL(SPACES, 7, code=3, first_step="zero"))
    data = window(init=((0, 0), (1, 0), (2, 0), (1, 4), (2, 9)))
    later = ~data["is_init"].squeeze(-1)
    torch.testing.assert_close(codes(source, data)[later], reference_codes(source, data, zero=True)[later])


def test_under_zero_the_first_code_sees_nothing_and_gets_no_gradient():
    source = shaken(SMALL(SPACES, 7, code=3, first_step="zero"))
    data = window()
    other = {**data, **{k: data[k] + 1 for k in ("observation", "previous_reward", "episode_done")}}
    first = codes(source, data)[:, 0]
    assert torch.equal(first, codes(source, other)[:, 0])
    gradients = torch.autograd.grad(first.sum(), list(source.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    gradients = torch.autograd.grad(codes(source, data)[:, 1].sum(), list(source.code.parameters()))
    assert all(g.any() for g in gradients)


def test_with_the_first_observation_the_first_code_gets_a_gradient():
    source = shaken(SMALL(SPACES, 7, code=3))
    gradients = torch.autograd.grad(codes(source, window())[:, 0].sum(), list(source.code.parameters()))
    assert all(g.any() for g in gradients)


def test_memory_crosses_episodes_but_never_trials():
    source = SMALL(SPACES, 7)
    data = window(init=((0, 0), (1, 0), (2, 0), (0, 5)))
    data["episode_done"][:, 5] = 1
    other = changed(data, "previous_reward", (slice(None), 2))
    before, after = codes(source, data), codes(source, other)
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert not torch.allclose(before[1, 5:], after[1, 5:])


def test_action_is_not_taken_for_action_zero_at_the_first_step():
    source = RecurrentContext(SPACES, 7, action_embedding=4, observation_embedding=0, reward_embedding=0)
    data = window()
    actions = data["previous_action"].clone()
    actions[:, 0] = (actions[:, 0] + 1) % 4
    assert torch.equal(codes(source, data), codes(source, {**data, "previous_action": actions}))
    actions[:, 1] = (actions[:, 1] + 1) % 4
    assert not torch.allclose(codes(source, data)[:, 1], codes(source, {**data, "previous_action": actions})[:, 1])


def test_a_real_action_enters_as_it_is():
    source = shaken(RecurrentContext(Spaces((2,), 3, False), 2, observation_embedding=0, reward_embedding=0))
    data = {**window(), "previous_action": torch.randn(3, 10, 3)}
    seen = []
    source.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    codes(source, data)
    layer = source.embeddings["action"].layers[0]
    expected = layer(data["previous_action"] * ~data["is_init"]).relu()
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("trials", [True, False])
def test_the_end_of_an_episode_is_seen_in_trials_alone(trials):
    source = SMALL(Spaces((2,), 4, True, trials=trials), 2)
    assert ("episode_done" in source.in_keys) == trials
    data = window()
    other = {**data, "episode_done": 1 - data["episode_done"]}
    if not trials:
        del data["episode_done"]
    assert torch.equal(codes(source, data), codes(source, other)) != trials


def test_images_enter_as_the_agents_encoder_sees_them():
    source = shaken(SMALL(Spaces((5, 5, 3), 4, True), 7))
    assert source.encoded
    data = {**window(), "observation": torch.randint(9, (3, 10, 5, 5, 3), dtype=torch.uint8)}
    before = codes(source, data)
    assert torch.equal(before, codes(source, {**data, "observation": data["observation"] + 1}))
    assert not torch.allclose(before, codes(source, changed(data, FEATURES, (slice(None), 3))))


def test_images_enter_raw_where_that_is_asked_for():
    source = SMALL(Spaces((5, 5, 3), 4, True), 7, encoded=False)
    data = {**window(), "observation": torch.randint(9, (3, 10, 5, 5, 3), dtype=torch.uint8)}
    before = codes(source, data)
    assert torch.equal(before, codes(source, changed(data, FEATURES, (slice(None), 3))))
    assert not torch.allclose(before, codes(source, {**data, "observation": data["observation"] + 1}))


def test_a_code_has_a_mean_and_a_deviation_for_each_number():
    assert RecurrentContext(SPACES, 7, code=5).out_features == 10
    assert RecurrentContext(SPACES, 7, encoder=partial(GRU, hidden=9)).out_features == 9


def test_a_task_is_standardised_by_all_that_was_seen_of_it():
    source = TaskContext(SPACES, 7)
    first, second = window(n=50), window(n=20)
    for data in (first, second):
        data["task"] = data["task"] * 3 + 7
        source.update_statistics(data)
    both = torch.cat([first["task"], second["task"]]).flatten(0, 1)
    expected = (first["task"] - both.mean(0)) / both.std(0, unbiased=False)
    torch.testing.assert_close(codes(source, first), expected)


def test_a_task_that_is_not_standardised_is_the_task():
    source = TaskContext(SPACES, 7, normalize=False)
    data = window()
    source.update_statistics(data)
    assert torch.equal(codes(source, data), data["task"])


def test_a_constant_is_one_learned_vector_at_every_step():
    source = ConstantContext(SPACES, 7, size=4)
    contexts = source(window(), None)[0]
    assert contexts.values.shape == (1, 4)
    assert torch.equal(contexts.each(), source.numbers.expand(3, 10, 4))
    assert contexts.values.requires_grad


@pytest.mark.parametrize("name", ["joined states", "joined both", "joined index"])
def test_joined_sources_lie_side_by_side(name):
    spaces, make = SOURCES[name]
    source = shaken(make(spaces, 7))
    data = indexed(window()) if spaces is INDEXED else window()
    apart = [codes(each, data) for each in source.sources]
    assert torch.equal(codes(source, data), torch.cat(apart, -1))
    assert source.out_features == sum(each.out_features for each in source.sources)


def test_joined_sources_update_the_statistics_of_each():
    source = JoinedContext(SPACES, 7, parts=[SMALL, TaskContext])
    data = window(n=50)
    source.update_statistics(data)
    torch.testing.assert_close(source.sources[1].norm.mean, data["task"].flatten(0, 1).double().mean(0))


def test_a_list_is_joined_and_null_is_none():
    assert make_context(None, SPACES, 7) is None
    assert isinstance(make_context(TaskContext, SPACES, 7), TaskContext)
    joined = make_context([TaskContext, SMALL], SPACES, 7)
    assert [type(each) for each in joined.sources] == [TaskContext, RecurrentContext]


def test_only_sources_that_read_the_task_are_told_it():
    told = {name: make(spaces, 7).told for name, (spaces, make) in SOURCES.items()}
    telling = {"task", "one-hot", "text", "joined states", "joined index", "joined both"}
    assert {name for name, yes in told.items() if yes} == telling


def test_a_users_own_source_serves_beside_ours():
    class Position(ContextSource):
        out_features, in_keys = 2, ("observation",)

        def __init__(self, spaces, features):
            super().__init__()

        def forward(self, window, state, role="decide"):
            return Contexts(window["observation"]), None

    source = JoinedContext(SPACES, 7, parts=[Position, SMALL])
    data = window()
    assert torch.equal(codes(source, data)[..., :2], data["observation"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(RecurrentContext, SPACES, 7, observation_embedding=0, action_embedding=0, reward_embedding=0),
         r"model.context: every embedding is 0"),
        (partial(TaskContext, INDEXED, 7), r"model.context: TaskContext .* task as an index: take OneHotContext"),
        (partial(TaskContext, Spaces((2,), 4, True), 7), r"model.context: TaskContext .* shows no task"),
        (partial(ConstantContext, SPACES, 7, size=0), r"ConstantContext.size is 0"),
        (partial(JoinedContext, SPACES, 7, parts=[]), r"model.context is an empty list"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
