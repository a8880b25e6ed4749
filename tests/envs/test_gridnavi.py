"""GridNavi follows the published rules, step by step."""

import numpy as np
import pytest
import torch

from lightning_hyper.envs import GridNavi, Trials

STAY, UP, RIGHT, DOWN, LEFT = range(5)


def steps_of(env, actions, goal=(4, 4)):
    """Steps of one environment under given actions; the goal is put where the test wants it."""
    env.begin()
    state = env.save_state()
    nav = state.get("inner", state)
    nav["goal"] = torch.tensor([goal], dtype=torch.float32)
    env.load_state(state)
    return [env.advance(torch.tensor([action])) for action in actions]


def trials(episodes, boundary="last", **options):
    return Trials(lambda **more: GridNavi(**options, **more), episodes, boundary, num_envs=1)


def test_moves_and_walls():
    cells = [tuple(s["observation"][0].tolist()) for s in steps_of(GridNavi(1), [LEFT, UP, UP, RIGHT, DOWN, STAY])]
    assert cells == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 1)]
    cells = [s["observation"][0].tolist() for s in steps_of(GridNavi(1, size=3), [UP, UP, UP, RIGHT, RIGHT, RIGHT])]
    assert cells == [[0, 1], [0, 2], [0, 2], [1, 2], [2, 2], [2, 2]]


def test_sparse_reward_is_one_on_the_goal_and_minus_a_tenth_elsewhere():
    rewards = [s["reward"].item() for s in steps_of(GridNavi(1), [UP, UP, STAY, RIGHT], goal=(0, 2))]
    assert rewards == pytest.approx([-0.1, 1.0, 1.0, -0.1])


def test_dense_reward_is_the_scaled_distance():
    rewards = [s["reward"].item() for s in steps_of(GridNavi(1, reward="dense"), [RIGHT, UP], goal=(2, 1))]
    assert rewards == pytest.approx([-2 / 5, -1 / 5])


def test_goals_are_uniform_over_the_21_cells_outside_the_corner():
    env = GridNavi(21_000)
    env.set_seed(0)
    goals = env.begin()["task"]
    cells, counts = goals.unique(dim=0, return_counts=True)
    assert {tuple(c) for c in cells.tolist()} == {(x, y) for x in range(5) for y in range(5) if x > 1 or y > 1}
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_an_episode_is_truncated_at_its_last_step():
    steps = steps_of(GridNavi(1, episode_steps=3), [UP, UP, UP])
    assert [s["truncated"].item() for s in steps] == [False, False, True]
    assert not any(s["terminated"].item() for s in steps)


def test_in_a_trial_the_last_cell_is_shown_and_the_next_move_is_from_the_corner():
    steps = steps_of(trials(4, episode_steps=3), [UP, UP, UP, RIGHT])
    assert steps[2]["observation"][0].tolist() == [0, 3]
    assert [s["episode_done"].item() for s in steps] == [0, 0, 1, 0]
    assert steps[3]["observation"][0].tolist() == [1, 0]
    assert [s["episode"].item() for s in steps] == [0, 0, 1, 1]
    assert [s["task"][0].tolist() for s in steps] == [[4, 4]] * 4


def test_goal_shown_at_episode_start():
    env = trials(2, "first", show_goal="episode_start", episode_steps=2)
    first = env.begin()
    assert first["observation"][0].tolist() == first["task"][0].tolist()
    steps = steps_of(env, [STAY, STAY, STAY], goal=(3, 3))
    assert [s["observation"][0].tolist() for s in steps] == [[0, 0], [3, 3], [0, 0]]


def test_goal_shown_when_a_step_ends_on_the_start_cell():
    env = GridNavi(1, show_goal="start_cell")
    assert env.begin()["observation"][0].tolist() == [0, 0]
    steps = steps_of(env, [LEFT, UP, DOWN], goal=(3, 3))
    assert [s["observation"][0].tolist() for s in steps] == [[3, 3], [0, 1], [3, 3]]


def test_a_goal_shown_on_the_start_cell_stays_while_others_begin():
    env = GridNavi(2, show_goal="start_cell")
    env.begin()
    shown = env.advance(torch.tensor([LEFT, LEFT]))["observation"]
    after = env.begin(torch.tensor([True, False]))["observation"]
    assert after.tolist() == [[0, 0], shown[1].tolist()]


def test_random_episodes_earn_what_the_markov_chain_says():
    cells = [(x, y) for x in range(5) for y in range(5)]
    chain = np.zeros((25, 25))
    for i, cell in enumerate(cells):
        for move in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
            chain[i, cells.index(tuple(np.clip(np.add(cell, move), 0, 4)))] += 0.2
    hits = sum(np.linalg.matrix_power(chain, t)[0] for t in range(1, 16))
    goals = [i for i, (x, y) in enumerate(cells) if x > 1 or y > 1]
    expected = -0.1 * 15 + 1.1 * hits[goals].mean()
    env = Trials(GridNavi, 4, "last", num_envs=21_000)
    env.set_seed(0)
    env.begin()
    for _ in range(4):
        earned = sum(env.advance(torch.randint(5, (21_000,)))["reward"] for _ in range(15))
        assert earned.mean().item() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 2}, "GridNavi.size is 2; it must be a whole number from 3"),
        ({"reward": "none"}, "GridNavi.reward is 'none'"),
        ({"show_goal": "x"}, "GridNavi.show_goal is 'x'"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        GridNavi(2, **options)


@pytest.mark.gpu
def test_gpu_trials_equal_cpu_trials():
    cpu, gpu = (Trials(GridNavi, 4, boundary, 64, device) for boundary, device in (("last", "cpu"), ("last", "cuda")))
    cpu.begin()
    state = cpu.save_state()
    gpu.begin()
    generator = gpu.inner.save_state()["generator"]
    gpu.load_state({**state, "generator": generator, "inner": {**state["inner"], "generator": generator}})
    for action in torch.randint(5, (60, 64)):
        expected, found = cpu.advance(action), gpu.advance(action.cuda())
        for key, entry in expected.items():
            assert torch.equal(entry, found[key].cpu()), key
