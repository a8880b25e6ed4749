"""Attention from task to task is what the retriever gave, and looking at it changes nothing."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tensordict import TensorDict

from lightning_hyper.algorithms import PPO, RetrievalPPO
from lightning_hyper.analysis.attention import Attention
from lightning_hyper.envs import GridNavi, MiniGrid, Trials
from lightning_hyper.experience import Rollouts
from lightning_hyper.memory import EpisodicMemory
from lightning_hyper.modules import OneHotContext, RecurrentContext
from lightning_hyper.modules.retriever import AttentionRetriever, KeyCache, Recall
from lightning_hyper.nn import GRU, GridEncoder, Hyper
from lightning_hyper.objectives import DynamicAlpha


def test_weights_are_gathered_from_task_to_task():
    """Two tasks, three entries of tasks 0, 1, 1; observations of task 0, 0, 1 with known weights."""
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.02, 0.9, 0.08]])

    def recall(part, places=None):
        assert part["observation"].shape[1:] == (1, 1)  # windows of one step
        assert (part["context_state"][:, 0] == part["observation"].flatten() + 10).all()
        mine = weights[part["observation"].flatten().long()]
        if places is None:  # a draw, as in training
            mine = mine[:, torch.randperm(3, generator=generator)[:2]]
        confidence = mine.amax(1)
        return None, None, Recall(confidence, confidence, confidence > 0, mine, places)

    generator = torch.Generator()
    before = generator.get_state()
    cache = KeyCache(3, 2, refresh=2)
    cache.calls = 5
    model = SimpleNamespace(
        clock=SimpleNamespace(frames=7, progress=0.0),
        agent=SimpleNamespace(window_keys=["observation"], state_features=1),
        cache=cache,
        memory=SimpleNamespace(
            draw=lambda: torch.arange(3), at=lambda _: {"task": torch.tensor([0, 1, 1])}, generator=generator
        ),
        recall=recall,
        alpha=DynamicAlpha(floor=0.6),
        device=None,
        spaces=SimpleNamespace(tasks=["MiniGrid-A-v0", "B"]),
    )
    entries = {"task": torch.tensor([[0], [0], [1]]), "observation": torch.arange(3.0).view(3, 1, 1)}
    batch = TensorDict({**entries, "context_state": entries["observation"] + 10}, batch_size=[3, 1])
    watching = Attention()
    metrics, matrix = watching.measure(model, batch)
    assert torch.equal(generator.get_state(), before)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(7))  # frames are the seed
    torch.testing.assert_close(matrix, torch.tensor([[0.6, 0.4], [0.02, 0.98]]))
    assert metrics["own_task"] == pytest.approx((0.5 + 0.7 + 0.98) / 3)
    # Chance is 1/3 for the observations of task 0 and 2/3 for that of task 1.
    assert metrics["own_over_chance"] == pytest.approx((0.5 + 0.7 + 0.98) / (1 / 3 + 1 / 3 + 2 / 3))
    draws = [weights[row, torch.randperm(3, generator=generator)[:2]].max() for row in order]
    confidences = torch.stack(draws)
    assert metrics["above_floor"] == pytest.approx((confidences > 0.6).float().mean().item())
    assert metrics["alpha"] == pytest.approx(confidences.clamp(min=0.6).median().item())
    watching.load_state_dict({"rows": [{"frames": 7, **metrics}], "matrix": matrix.tolist()})
    assert len(watching.draw(model).axes) == 4


class Traces(Callback):
    """What a look might leave behind, after every batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, model, *_):
        cache = model.cache.save_state()
        self.found.append([cache["calls"], cache["keys"], cache["made"], model.memory.generator.get_state()])


TASKS = ["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0", "MiniGrid-DistShift1-v0"]


def retrieval(context):
    model = RetrievalPPO(
        encoder=partial(GridEncoder, channels=[4, 4, 8]),
        context=context,
        decision=partial(Hyper, hidden=[]),
        retriever=partial(AttentionRetriever, subset=5, refresh=3),
        memory=EpisodicMemory(capacity=10),
        epochs=2,
        minibatches=2,
    )
    return model, Rollouts(partial(MiniGrid, num_envs=6, levels=8, tasks=TASKS), steps=16, eval_envs=3)


@pytest.mark.parametrize("context", [OneHotContext, partial(RecurrentContext, encoder=partial(GRU, hidden=6))])
def test_looking_at_attention_leaves_training_alone(fit, tmp_path, context):
    weights, traces = [], []
    for watching in ([Attention(every=200, observations=20)], []):
        (tmp_path / "attention.png").unlink(missing_ok=True)
        model, data = retrieval(context)
        traces.append(Traces())
        fit(model, data, [*watching, traces[-1]], 768)
        assert (tmp_path / "attention.png").exists() == bool(watching)
        assert not watching or len(watching[0].rows) >= 2
        weights.append(model.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
    for one, other in zip(traces[0].found, traces[1].found, strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_a_model_without_a_memory_and_an_environment_without_indexed_tasks_are_refused(fit):
    trials = partial(Trials, partial(GridNavi, num_envs=4, episode_steps=4))
    with pytest.raises(ValueError, match="model PPO has no memory; take RetrievalPPO"):
        fit(PPO(), Rollouts(trials, steps=None), [Attention()], 100)
    model = RetrievalPPO(retriever=AttentionRetriever, memory=EpisodicMemory())
    with pytest.raises(ValueError, match=r"Attention: data\.env shows no tasks that are an index"):
        fit(model, Rollouts(trials, steps=None), [Attention()], 100)
