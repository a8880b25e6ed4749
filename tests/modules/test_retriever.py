"""What retrievers weigh and which keys are kept, against loops and calculations by hand."""

from functools import partial

import pytest
import torch

from lightning_hyper.checks import RecipeError
from lightning_hyper.modules.retriever import AttentionRetriever, KeyCache, NearestRetriever
from lightning_hyper.nn import MLP

B, K = 6, 5


@pytest.mark.parametrize("every", [False, True])
def test_attention_equals_a_loop_with_its_gradients(every):
    query, key = torch.randn(B, 4, requires_grad=True), torch.randn(K, 4, requires_grad=True)
    value, places = torch.randn(K, requires_grad=True), torch.arange(K) + 10
    allowed = torch.ones(B, K, dtype=torch.bool) if every else torch.rand(B, K) < 0.6
    allowed[0] = every  # nothing at all
    found = AttentionRetriever(4, 3).recall(query, key, value, None if every else allowed, places)
    values, confidence = [], []
    for b in range(B):
        scores = {k: (query[b] @ key[k]).exp() for k in range(K) if allowed[b, k]}
        weights = {k: score / sum(scores.values()) for k, score in scores.items()}
        values.append(sum((w * value[k] for k, w in weights.items()), torch.zeros(())))
        confidence.append(max(weights.values(), default=torch.zeros(())))
    values, confidence = torch.stack(values), torch.stack(confidence)
    torch.testing.assert_close(found.value, values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.confidence, confidence, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.known, allowed.any(1))
    assert torch.equal(found.places, places)
    got = torch.autograd.grad((found.value + found.confidence).sum(), (query, key, value))
    want = torch.autograd.grad((values + confidence).sum(), (query, key, value))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # finite where nothing is allowed


def test_heads_attend_apart_and_scaling_flattens():
    query, key = torch.randn(B, 6), torch.randn(K, 6)
    two = AttentionRetriever(6, 4, heads=2).weigh(query, key, None)
    parts = [(query[:, s] @ key[:, s].T).softmax(-1) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(two, sum(parts) / 2)
    scaled = AttentionRetriever(6, 4, scaled=True).weigh(query, key, None)
    torch.testing.assert_close(scaled, (query @ key.T / 6**0.5).softmax(-1))


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


def test_a_projection_is_made_by_the_sizes_of_features_and_context():
    retriever = AttentionRetriever(6, 3, projection=partial(MLP, hidden=[]))
    assert retriever.projection(torch.randn(2, 6), torch.randn(2, 3)).shape == (2, 6)
    assert AttentionRetriever(6, 3).projection is None


class Keys:
    """Keys by hand: `version` in all places but those that are named."""

    def __init__(self):
        self.version, self.made = 1.0, []

    def __call__(self, places):
        self.made.append(places.tolist())
        return torch.full((len(places), 2), self.version) + places.unsqueeze(1)


def test_kept_keys_are_made_again_where_entries_are_new_or_all_are_due():
    cache, keys = KeyCache(4, 2, refresh=3), Keys()
    stamps, places = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 0, 1])

    def first():
        return cache.keys(places, stamps, keys)[:, 0].tolist()

    assert first() == [3, 1, 2]
    keys.version = 100.0
    assert first() == [3, 1, 2]  # the second call: kept
    stamps[0] = 4
    assert first() == [3, 100, 2]  # the third: the new entry alone
    assert first() == [102, 100, 101]  # the fourth: all
    assert keys.made == [[2, 0, 1], [0], [2, 0, 1]]
    stamps[3] = 5
    assert cache.keys(torch.tensor([3]), stamps, keys)[:, 0].tolist() == [103]
    assert keys.made[-1] == [3]


def test_kept_keys_have_no_gradient():
    made = torch.nn.Linear(1, 2)
    cache = KeyCache(4, 2, refresh=3)
    found = cache.keys(torch.tensor([0, 1]), torch.ones(4, dtype=torch.int64), lambda at: made(at.unsqueeze(1).float()))
    assert not found.requires_grad


def test_a_restored_cache_goes_on_exactly():
    cache, other, keys = KeyCache(4, 2, refresh=2), KeyCache(4, 2, refresh=2), Keys()
    stamps, places = torch.tensor([1, 2, 3, 4]), torch.arange(4)
    cache.keys(places, stamps, keys)
    other.load_state(cache.save_state())
    keys.version = 7.0
    for _ in range(3):  # kept, due, kept
        stamps[1] += 9
        assert torch.equal(cache.keys(places, stamps, keys), other.keys(places, stamps, keys))


def test_bad_options_are_named():
    for make, message in (
        (partial(AttentionRetriever, subset=0), r"Retriever.subset is 0"),
        (partial(AttentionRetriever, refresh=0), r"Retriever.refresh is 0"),
        (partial(AttentionRetriever, heads=4), r"heads is 4; it must divide the encoder's 6"),
        (partial(NearestRetriever, k=0), r"Retriever.k is 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            make(6, 4)
