"""The agent of PPO: what it chooses, and that a window of it says what stepping it said."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import ActorCritic, OneHotContext, RecurrentContext, TaskContext, TextContext
from lightning_hyper.nn import GRU, MLP, Concat, ContextOnly, FiLM, GridEncoder, Hyper, VectorEncoder

VECTOR = Spaces((3,), 4, True)
REAL = Spaces((3,), 2, False)
TASKS = Spaces((3,), 4, True, tasks=("a", "b", "c"))
IMAGES = Spaces((7, 7, 3), 4, True, tasks=("a", "b", "c"), missions=(("get to the green goal square",),) * 3)
HEAD = partial(Concat, hidden=[6])
GRID = partial(GridEncoder, channels=(4, 4, 6))
MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=5))


def agent(spaces=VECTOR, **parts):
    made = ActorCritic(spaces, **{"actor": HEAD, "critic": HEAD, **parts})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def window(spaces, n=5, steps=7):
    shape, action = spaces.observation, torch.randint(spaces.actions, (n, steps))
    is_init = torch.rand(n, steps, 1) < 0.2
    is_init[:, 0] = True
    return {
        "observation": torch.randint(9, (n, steps, *shape), dtype=torch.uint8) if spaces.is_image
        else torch.randn(n, steps, *shape),
        "is_init": is_init,
        "previous_action": action if spaces.discrete else torch.randn(n, steps, spaces.actions),
        "previous_reward": torch.randn(n, steps, 1),
        "task": torch.randint(3, (n, steps)),
        "mission": torch.randint(3, (n, steps)),
    }  # fmt: skip


PARTS = {
    "plain": (VECTOR, {"actor": MLP, "critic": MLP}),
    "encoder": (VECTOR, {"encoder": VectorEncoder}),
    "recurrent": (VECTOR, {"context": MEMORY, "actor": Hyper, "critic": Hyper}),
    "recurrent, context alone": (VECTOR, {"context": MEMORY, "actor": ContextOnly, "critic": ContextOnly}),
    "embedded": (VECTOR, {"context": MEMORY, "embedding": partial(VectorEncoder, widths=(3,))}),
    "real actions": (REAL, {"context": MEMORY, "actor": FiLM}),
    "told": (TASKS, {"context": OneHotContext, "actor": Hyper}),
    "decision": (TASKS, {"context": OneHotContext, "decision": partial(Hyper, hidden=[]), "actor": MLP, "critic": MLP}),
    "joined": (TASKS, {"context": [OneHotContext, MEMORY], "actor": Hyper}),
    "images": (IMAGES, {"encoder": GRID, "context": [OneHotContext, TextContext], "critic": Hyper}),
    "images, recurrent": (IMAGES, {"encoder": GRID, "context": MEMORY}),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_window_gives_the_log_probabilities_and_values_of_acting(name):
    spaces, parts = PARTS[name]
    made, data = agent(spaces, **parts), window(spaces)
    state, before = None, None
    with torch.no_grad():
        chosen = []
        for t in range(7):
            if t == 2:
                before = state
            step, state = made.act({key: entry[:, t] for key, entry in data.items()}, state)
            chosen.append(step)
        acted = {key: torch.stack([step[key] for step in chosen], 1) for key in chosen[0]}
        for begin, state in ((0, None), (2, before)):
            rest = {key: entry[:, begin:] for key, entry in data.items()}
            x, contexts, _ = made.encode(rest, state)
            policy, value = made.heads(x.flatten(0, 1), contexts.flat())
            log_prob = policy.log_prob(acted["action"][:, begin:].flatten(0, 1))
            torch.testing.assert_close(log_prob, acted["log_prob"][:, begin:].flatten(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(value, acted["state_value"][:, begin:].flatten(0, 1), atol=1e-5, rtol=1e-4)


def test_a_gaussians_log_probability_is_the_formulas():
    made = agent(REAL)
    data = {key: entry[:, 0] for key, entry in window(REAL, n=50).items()}
    chosen, _ = made.act(data, None)
    mean, deviation = made.actor(data["observation"], torch.zeros(50, 0)), made.log_std.exp()
    assert not torch.allclose(deviation, torch.ones(2))
    z = (chosen["action"] - mean) / deviation
    expected = (-0.5 * z.square() - deviation.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(chosen["log_prob"], expected)
    assert z.std().item() == pytest.approx(1, abs=0.25)
    policy, _ = made.heads(data["observation"], made.contexts(data, data["observation"], None)[0])
    torch.testing.assert_close(
        policy.entropy(), (deviation.log() + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(50)
    )


def test_an_index_is_drawn_as_often_as_its_probability_says():
    made = agent()
    data = {key: entry[:, 0].expand(4000, *entry.shape[2:]) for key, entry in window(VECTOR, n=1).items()}
    chosen, _ = made.act(data, None)
    probability = made.actor(data["observation"][:1], torch.zeros(1, 0)).softmax(-1)[0]
    share = chosen["action"].bincount(minlength=4) / 4000
    assert (share - probability).abs().max() < 0.04  # 5 standard deviations
    torch.testing.assert_close(chosen["log_prob"], probability.log()[chosen["action"]])


@pytest.mark.parametrize("spaces", [VECTOR, REAL])
def test_the_deterministic_action_is_the_most_likely(spaces):
    made = agent(spaces)
    data = {key: entry[:, 0] for key, entry in window(spaces).items()}
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        chosen, _ = made.act(data, None)
    out = made.actor(data["observation"], torch.zeros(5, 0))
    assert torch.equal(chosen["action"], out.argmax(-1) if spaces.discrete else out)


def test_a_step_that_is_not_acted_in_has_the_value_that_acting_gives():
    made, data = agent(context=MEMORY), window(VECTOR)
    step, state = {key: entry[:, 0] for key, entry in data.items()}, torch.randn(5, 5)
    step["is_init"] = torch.zeros(5, 1, dtype=torch.bool)
    generator = torch.get_rng_state()
    value = made.value_of(step, state)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(value, made.act(step, state)[0]["state_value"])
    assert not torch.allclose(value, made.value_of(step, None))


def test_a_decision_layer_makes_the_input_of_both_heads():
    made, data = agent(*PARTS["decision"][:1], **PARTS["decision"][1]), window(TASKS)
    x, contexts, _ = made.encode(data, None)
    policy, value = made.heads(x.flatten(0, 1), contexts.flat())
    ((weight, bias, _),) = made.decision.generate(torch.eye(3))
    task = data["task"].flatten()
    decided = torch.einsum("boi,bi->bo", weight[task], x.flatten(0, 1)) + bias[task]
    torch.testing.assert_close(value, made.critic(decided, torch.zeros(35, 3)))
    torch.testing.assert_close(policy.logits, made.actor(decided, torch.zeros(35, 3)).log_softmax(-1))


def test_an_embedding_is_shared_by_all_that_the_context_conditions():
    embedding = partial(VectorEncoder, widths=(2,))
    made, data = agent(TASKS, context=OneHotContext, embedding=embedding), window(TASKS)
    _, contexts, _ = made.encode(data, None)
    assert contexts.values.shape == (3, 2)  # embedded once for each task
    torch.testing.assert_close(contexts.values, made.embedding(torch.eye(3)))
    assert made.context_features == made.actor.context_features == made.critic.context_features == 2


def test_a_role_reaches_the_contexts():
    made, data = agent(TASKS, context=partial(OneHotContext, role=True)), window(TASKS)
    bits = [made.encode(data, None, role)[1].each()[..., -1].unique().tolist() for role in ("decide", "retrieve")]
    assert bits == [[0], [1]]


def test_a_recurrent_context_of_images_sees_them_encoded_and_teaches_the_encoder():
    made, data = agent(*PARTS["images, recurrent"][:1], **PARTS["images, recurrent"][1]), window(IMAGES)
    inputs = []
    made.context.embeddings["observation"].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    _, contexts, _ = made.encode(data, None)
    torch.testing.assert_close(inputs[0], made.observation.encoder(data["observation"]))
    gradients = torch.autograd.grad(contexts.each()[:, -1].sum(), list(made.observation.parameters()))
    assert all(g.any() for g in gradients)


def test_networks_have_the_papers_sizes():
    spaces = Spaces((7, 7, 3), 7, True, tasks=tuple("abcdefg"), missions=(("get to the green goal square",),) * 7)
    task = partial(OneHotContext, hidden=[32], outputs=64, role=True)
    head, layer = partial(MLP, hidden=[64]), partial(Hyper, hidden=[])
    parts = {"encoder": GridEncoder, "context": [task, TextContext], "decision": layer, "actor": head, "critic": head}
    made = agent(spaces, **parts)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in made.named_children()}
    assert (sizes["observation"], sizes["actor"], sizes["critic"]) == (10_544, 4_615, 4_225)
    # 128 -> 4096 and 128 -> 64; the paper's 571,872 are these and branches of 8 and 512 inputs.
    assert sizes["decision"] == 128 * 4096 + 4096 + 128 * 64 + 64
    assert sizes["decision"] + (8 * 32 + 32) + (32 * 64 + 64) + 512 * 64 + 64 == 571_872


def test_statistics_of_the_observation_and_of_the_context_take_in_a_batch():
    spaces = Spaces((3,), 4, True, task=2)
    made = agent(spaces, context=TaskContext, normalize_observation=True)
    data = {**window(spaces, n=50), "task": torch.randn(50, 7, 2) + 3}
    made.update_statistics(data)
    torch.testing.assert_close(made.observation.norm.mean, data["observation"].flatten(0, 1).double().mean(0))
    torch.testing.assert_close(made.context.norm.mean, data["task"].flatten(0, 1).double().mean(0))


def test_only_agents_that_are_told_their_task_say_so():
    assert not agent().told
    assert not agent(context=MEMORY).told
    assert agent(TASKS, context=[OneHotContext, MEMORY]).told


BLIND = {"actor": partial(MLP, hidden=[]), "critic": partial(MLP, hidden=[])}


@pytest.mark.parametrize(
    ("spaces", "parts", "message"),
    [
        (VECTOR, {"embedding": VectorEncoder}, r"model.embedding is given without model.context"),
        (VECTOR, {"decision": Concat}, r"model.decision is given without model.context"),
        (VECTOR, {"context": MEMORY, **BLIND}, r"model.context is given, but neither model.actor, model.critic nor"),
        (VECTOR, {"context": MEMORY, "decision": MLP}, r"model.decision: MLP as it is set ignores its context"),
        (
            VECTOR,
            {"context": MEMORY, "decision": partial(FiLM, hidden=[], film_output=False)},
            r"model.decision: FiLM as it is set ignores its context",
        ),
        (IMAGES, {}, r"data.env shows images \(7, 7, 3\), which need model.encoder"),
        (VECTOR, {"context": OneHotContext}, r"model.context: OneHotContext needs tasks"),
        (VECTOR, {"actor": Hyper}, r"Hyper generates weights from a context, and there is none: name model.context"),
    ],
)
def test_what_has_no_meaning_is_refused(spaces, parts, message):
    with pytest.raises(ValueError, match=message):
        agent(spaces, **parts)


def test_a_users_own_network_is_taken_to_use_its_context():
    class Mine(nn.Module):
        def __init__(self, features, context_features, out_features):
            super().__init__()
            self.layer = nn.Linear(features + context_features, out_features)

        def forward(self, x, context):
            return self.layer(torch.cat([x, context], -1))

    made = agent(context=MEMORY, actor=Mine, critic=MLP, decision=Mine)
    assert made.act({key: entry[:, 0] for key, entry in window(VECTOR).items()}, None)[0]["action"].shape == (5,)


def test_a_users_own_embedding_need_not_say_its_features():
    class Squares(nn.Module):
        def __init__(self, shape):
            super().__init__()

        def forward(self, x):
            return x.square()

    assert agent(context=MEMORY, embedding=Squares).context_features == 5
