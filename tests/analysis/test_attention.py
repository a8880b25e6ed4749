"""Attention from task to task is what the retriever gave, and looking at it changes nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.analysis.attention import Attention
from lightning_hyper.modules.retriever import Recall
from lightning_hyper.objectives import DynamicAlpha

TINY = Path(__file__).parents[1] / "tiny.yaml"
TINY_RETRIEVAL = Path(__file__).parents[1] / "tiny_retrieval.yaml"


def test_weights_are_gathered_from_task_to_task():
    """Two tasks, three entries of tasks 0, 1, 1; observations of task 0, 0, 1 with known weights."""
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.02, 0.9, 0.08]])
    kept = {}

    def recall(seen, places=None):
        mine = weights[seen["observation"][:, 0, 0, 0].long()]
        if places is None:  # a draw, as in training
            mine = mine[:, torch.randperm(3, generator=generator)[:2]]
        confidence = mine.amax(1)
        return None, Recall(confidence, confidence, confidence > 0, mine, places)

    generator = torch.Generator()
    before = generator.get_state()
    model = SimpleNamespace(
        clock=SimpleNamespace(frames=7, progress=0.0),
        retriever=SimpleNamespace(kept_keys=lambda: "before", restore_keys=lambda keys, _: kept.update(keys=keys)),
        memory=SimpleNamespace(
            draw=lambda: torch.arange(3),
            tasks_at=lambda _: torch.tensor([0, 1, 1]),
            missions="ab",
            generator=generator,
        ),
        recall=recall,
        alpha=DynamicAlpha(floor=0.6),
        device=None,
        spaces=SimpleNamespace(tasks=["MiniGrid-A-v0", "B"]),
    )
    task = torch.tensor([[0], [0], [1]])
    batch = TensorDict(
        {"task": task, "mission": task, "observation": torch.arange(3).view(3, 1, 1, 1, 1)}, batch_size=[3]
    )
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
    assert kept["keys"] == "before"
    watching.load_state_dict({"rows": [{"frames": 7, **metrics}], "matrix": matrix.tolist()})
    assert len(watching.draw(model).axes) == 4


def test_looking_at_attention_leaves_training_alone(tiny):
    kept_keys = ("--model.init_args.retriever.init_args.refresh", "3")
    weights = []
    for run, options in (("with", ()), ("without", ("--trainer.callbacks", "[]"))):
        assert tiny("fit", "--run", run, *kept_keys, *options, recipe=TINY_RETRIEVAL) == 0
        folder = Path("runs/tiny") / run
        assert (folder / "attention.png").exists() == (run == "with")
        weights.append(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])


def test_a_model_without_a_memory_is_refused(tiny, capsys):
    assert tiny("fit", "--trainer.callbacks+=Attention") == 2
    assert "MetaPPO has no memory; take RetrievalPPO" in capsys.readouterr().err
