"""Retrieval against loops and calculations by hand, gradients included."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.memory import EpisodicMemory
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.retriever import AttentionRetriever, NearestRetriever
from lightning_hyper.modules.task import RETRIEVE, OneHotTask
from lightning_hyper.modules.task_agent import TaskAgent
from lightning_hyper.nn import MLP, GridEncoder, Hyper, InputOnly

SPACES = Spaces(147, 3, 7, True, image=(7, 7, 3), tasks=tuple("abc"), missions=(("go",), ("run", "walk"), ("open",)))
TASK_OF = torch.tensor([0, 1, 1, 2])
B, K = 6, 5


def agent():
    head = partial(MLP, hidden=[8], activation="tanh")
    return TaskAgent(
        SPACES,
        encoder=partial(GridEncoder, channels=(4, 4, 6)),
        actor=head,
        critic=head,
        task=OneHotTask,
        decision=partial(Hyper, hidden=[], init="normc"),
    )


def observations(n):
    return torch.randint(0, 6, (n, 7, 7, 3), dtype=torch.uint8)


def filled(n=K):
    memory = EpisodicMemory(capacity=n, rule="newest", recentre=False)
    memory.begin(SPACES.image, SPACES.missions, 0)
    mission = torch.randint(0, 4, (n,))
    entries = {
        "observation": observations(n),
        "value": torch.randn(n),
        "state_value": torch.zeros(n, 1),
        "task": TASK_OF[mission],
        "mission": mission,
        "episode_return": torch.zeros(n),
    }
    memory.insert(TensorDict(entries, batch_size=[n]))
    return memory


def by_hand(made, memory, seen, mission, allowed):
    """One observation and one entry at a time, from the generated weights."""

    def projected(observation, which):
        features = made.encoder(observation.unsqueeze(0))
        ((weight, bias, _),) = made.decision.generate(made.task(which.view(1), torch.tensor([RETRIEVE])))
        return weight[0] @ features[0] + bias[0]

    held = memory.entries
    keys = [projected(held["observation"][k], held["mission"][k]) for k in range(K)]
    values, confidence = [], []
    for b in range(B):
        query = projected(seen[b], mission[b])
        scores = {k: (query @ keys[k]).exp() for k in range(K) if allowed[b, k]}
        total = sum(scores.values())
        weights = {k: score / total for k, score in scores.items()}
        values.append(sum((w * held["value"][k] for k, w in weights.items()), torch.zeros(())))
        confidence.append(max(weights.values(), default=torch.zeros(())))
    return torch.stack(values), torch.stack(confidence)


@pytest.mark.parametrize("tasks", ["all", "own"])
def test_attention_equals_a_loop_with_its_gradients(tasks):
    made, memory = agent(), filled()
    retriever = AttentionRetriever(made.features, made.task.out_features, subset=None, tasks=tasks)
    seen, mission = observations(B), torch.tensor([0, 1, 2, 3, 1, 0])
    allowed = torch.ones(B, K, dtype=torch.bool)
    if tasks == "own":
        allowed = TASK_OF[mission].unsqueeze(1) == memory.entries["task"]
        assert not allowed.all()
    recall = retriever(made, seen, TASK_OF[mission], mission, memory)[1]
    value, confidence = by_hand(made, memory, seen, mission, allowed)
    torch.testing.assert_close(recall.value, value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(recall.confidence, confidence, atol=1e-5, rtol=1e-4)
    assert torch.equal(recall.known, allowed.any(1))
    parameters = [p for part in (made.encoder, made.task, made.decision) for p in part.parameters()]
    got = torch.autograd.grad((recall.value + recall.confidence).sum(), parameters)
    want = torch.autograd.grad((value + confidence).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert any(g.abs().sum() > 0 for g in got)


def test_what_is_allowed_nothing_is_unknown_and_has_finite_gradients():
    made, memory = agent(), filled()
    memory.entries["task"].fill_(0)
    memory.entries["mission"].fill_(0)
    retriever = AttentionRetriever(made.features, made.task.out_features, subset=None, tasks="own")
    mission = torch.tensor([3, 0])
    recall = retriever(made, observations(2), TASK_OF[mission], mission, memory)[1]
    assert recall.known.tolist() == [False, True]
    assert recall.value[0] == recall.confidence[0] == 0
    grads = torch.autograd.grad((recall.value + recall.confidence).sum(), list(made.decision.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_heads_attend_apart_and_scaling_flattens():
    query, key = torch.randn(B, 6), torch.randn(K, 6)
    two = AttentionRetriever(6, 4, heads=2).weigh(query, key, None)
    parts = [(query[:, s] @ key[:, s].T).softmax(-1) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(two, sum(parts) / 2)
    scaled = AttentionRetriever(6, 4, scaled=True).weigh(query, key, None)
    torch.testing.assert_close(scaled, (query @ key.T / 6**0.5).softmax(-1))


@pytest.mark.parametrize("options", [{}, {"projection": partial(InputOnly, hidden=[])}, {"refresh": 2}])
def test_the_decision_layer_decides_as_it_does_without_a_memory(options):
    made, memory = agent(), filled()
    retriever = AttentionRetriever(made.features, made.task.out_features, subset=None, **options)
    seen, mission = observations(B), torch.tensor([0, 1, 2, 3, 1, 0])
    decided, _ = retriever(made, seen, TASK_OF[mission], mission, memory)
    torch.testing.assert_close(decided, made.decide(made.encoder(seen), mission), atol=1e-5, rtol=1e-4)


def test_a_subset_takes_so_many_entries_anew_each_time():
    made, memory = agent(), filled(40)
    retriever = AttentionRetriever(made.features, made.task.out_features, subset=15)
    mission = torch.zeros(B, dtype=torch.int64)
    recalls = [retriever(made, observations(B), mission, mission, memory)[1] for _ in range(2)]
    assert [len(recall.places) for recall in recalls] == [15, 15]
    assert not torch.equal(recalls[0].places.sort().values, recalls[1].places.sort().values)


def test_an_empty_memory_says_nothing():
    made = agent()
    retriever = AttentionRetriever(made.features, made.task.out_features)
    memory = EpisodicMemory()
    memory.begin(SPACES.image, SPACES.missions, 0)
    mission = torch.zeros(B, dtype=torch.int64)
    assert retriever(made, observations(B), mission, mission, memory)[1] is None


def test_a_projection_of_its_own_is_used_and_knows_no_task():
    made, memory = agent(), filled()
    retriever = AttentionRetriever(
        made.features, made.task.out_features, subset=None, projection=partial(InputOnly, hidden=[])
    )
    seen, mission = observations(B), torch.tensor([0, 1, 2, 3, 1, 0])
    recall = retriever(made, seen, TASK_OF[mission], mission, memory)[1]
    (layer,) = retriever.projection.layers
    query, key = (layer(made.encoder(x)) for x in (seen, memory.entries["observation"]))
    torch.testing.assert_close(recall.weights, (query @ key.T).softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kernel", ["cosine", "inverse_distance"])
def test_nearest_entries_equal_a_loop(kernel, every):
    query, key = torch.randn(B, 4), torch.randn(K, 4)
    allowed = torch.ones(B, K, dtype=torch.bool) if every else torch.rand(B, K) < 0.7
    weights = NearestRetriever(4, 0, k=2, kernel=kernel).weigh(query, key, None if every else allowed)
    for b in range(B):
        if kernel == "cosine":
            near = {k: float(torch.cosine_similarity(query[b], key[k], 0)) for k in range(K) if allowed[b, k]}
            raw = {k: torch.tensor(v).exp().item() for k, v in near.items()}
        else:
            near = {k: -float((query[b] - key[k]).square().sum()) for k in range(K) if allowed[b, k]}
            raw = {k: 1 / (1e-3 - v) for k, v in near.items()}
        best = sorted(near, key=near.get, reverse=True)[:2]
        total = sum(raw[k] for k in best)
        expected = [raw[k] / total if k in best else 0.0 for k in range(K)]
        assert weights[b].tolist() == pytest.approx(expected, rel=1e-4)


def test_kept_keys_are_encoded_again_when_entries_are_new_or_time_has_come():
    made, memory = agent(), filled()
    retriever = AttentionRetriever(made.features, made.task.out_features, subset=None, refresh=3)
    fresh = AttentionRetriever(made.features, made.task.out_features, subset=None)
    mission = torch.zeros(B, dtype=torch.int64)
    seen = observations(B)

    def weights(of):
        with torch.no_grad():
            return of(made, seen, mission, mission, memory)[1].weights

    torch.testing.assert_close(weights(retriever), weights(fresh))
    key_before = retriever.keys.clone()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.1)
    weights(retriever)
    assert torch.equal(retriever.keys, key_before)  # the second call
    memory.insert(filled(1).entries.update({"state_value": torch.zeros(1, 1)}))
    weights(retriever)
    assert (retriever.keys != key_before).any(1).sum() == 1  # the third: the new entry alone
    torch.testing.assert_close(weights(retriever), weights(fresh))  # the fourth: all
    recall = retriever(made, seen, mission, mission, memory)[1]
    assert not torch.autograd.grad(recall.value.sum(), made.encoder.parameters(), allow_unused=True)[0].isnan().any()


def test_bad_options_are_named():
    for options, message in (
        ({"subset": 0}, "retriever.subset is 0"),
        ({"tasks": "mine"}, "retriever.tasks is 'mine'"),
        ({"heads": 4}, "retriever.heads is 4; it must divide the encoder's 6"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionRetriever(6, 4, **options)
    with pytest.raises(ValueError, match=r"retriever.kernel is 'rbf'"):
        NearestRetriever(6, 4, kernel="rbf")
