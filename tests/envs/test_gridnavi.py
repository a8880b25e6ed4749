"""GridNavi follows the published rules, step by step."""

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from lightning_hyper.analysis.gridnavi import explorer_returns, random_returns, told_returns
from lightning_hyper.envs import GridNavi

STAY, UP, RIGHT, DOWN, LEFT = range(5)


def play(env, actions, goal=(4, 4), step=None):
    """Steps of one environment under given actions; the goal is put where the test wants it."""
    step = env.reset() if step is None else step
    step["task"] = torch.tensor([goal], dtype=torch.float32)
    steps = []
    for action in actions:
        step["action"] = torch.tensor([action])
        following = env.step(step)["next"].clone()
        steps.append(following)
        step = following.exclude("reward", "done", "terminated")
    return steps


def test_specs_hold():
    check_env_specs(GridNavi(4))


def test_moves_and_walls():
    cells = [tuple(s["observation"][0].tolist()) for s in play(GridNavi(1), [LEFT, UP, UP, RIGHT, DOWN, STAY])]
    assert cells == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 1)]


def test_sparse_reward_is_one_on_the_goal_and_minus_a_tenth_elsewhere():
    rewards = [s["reward"].item() for s in play(GridNavi(1), [UP, UP, STAY, RIGHT], goal=(0, 2))]
    assert rewards == pytest.approx([-0.1, 1.0, 1.0, -0.1])


def test_dense_reward_is_the_scaled_distance():
    rewards = [s["reward"].item() for s in play(GridNavi(1, reward="dense"), [RIGHT, UP], goal=(2, 1))]
    assert rewards == pytest.approx([-2 / 5, -1 / 5])


def test_goals_are_uniform_over_the_21_cells_outside_the_corner():
    env = GridNavi(21_000)
    env.set_seed(0)
    goals = env.reset()["task"]
    cells, counts = goals.unique(dim=0, return_counts=True)
    assert {tuple(c) for c in cells.tolist()} == {(x, y) for x in range(5) for y in range(5) if x > 1 or y > 1}
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_episode_end_shows_the_last_cell_and_starts_again_from_the_corner():
    env = GridNavi(1, episode_steps=3)
    steps = play(env, [UP, UP, UP, RIGHT])
    assert steps[2]["observation"][0].tolist() == [0, 3]
    assert [s["episode_done"].item() for s in steps] == [0, 0, 1, 0]
    assert steps[3]["observation"][0].tolist() == [1, 0]
    assert [s["episode"].item() for s in steps] == [0, 0, 1, 1]


def test_done_comes_only_at_the_end_of_the_trial_and_is_a_termination():
    env = GridNavi(3, episodes=2, episode_steps=4)
    batch = env.rollout(8, break_when_any_done=False)
    done = batch["next", "done"].squeeze(-1)
    assert done.sum().item() == 3
    assert done[:, 7].all()
    assert torch.equal(batch["next", "terminated"], batch["next", "done"])
    assert batch["is_init"].squeeze(-1).sum(1).tolist() == [1, 1, 1]


def test_previous_action_and_reward_are_those_of_the_step_before():
    steps = play(GridNavi(1), [UP, UP, RIGHT], goal=(0, 2))
    assert [s["previous_action"].item() for s in steps] == [UP, UP, RIGHT]
    assert [s["previous_reward"].item() for s in steps] == pytest.approx([s["reward"].item() for s in steps])


def test_goal_shown_at_episode_start():
    env = GridNavi(1, show_goal="episode_start", episode_steps=2)
    first = env.reset()
    assert first["observation"][0].tolist() == first["task"][0].tolist()
    steps = play(env, [STAY, STAY, STAY], goal=(3, 3))
    assert [s["observation"][0].tolist() for s in steps] == [[0, 0], [3, 3], [0, 0]]


def test_goal_shown_when_a_step_ends_on_the_start_cell():
    env = GridNavi(1, show_goal="start_cell")
    assert env.reset()["observation"][0].tolist() == [0, 0]
    steps = play(env, [LEFT, UP, DOWN], goal=(3, 3))
    assert [s["observation"][0].tolist() for s in steps] == [[3, 3], [0, 1], [3, 3]]


def test_only_finished_trials_are_reset():
    env = GridNavi(4, episodes=1, episode_steps=10)
    step = env.reset()
    step["step_count"][1] = 9
    goal = step["task"].clone()
    step["action"] = torch.full((4,), UP)
    _, after = env.step_and_maybe_reset(step)
    assert after["is_init"].squeeze(-1).tolist() == [False, True, False, False]
    assert after["step_count"].squeeze(-1).tolist() == [1, 0, 1, 1]
    assert torch.equal(after["task"][[0, 2, 3]], goal[[0, 2, 3]])


def test_saved_generator_gives_the_same_tasks_again():
    env = GridNavi(32)
    env.set_seed(3)
    env.reset()
    state = {k: v.clone() for k, v in env.save_state().items()}
    expected = env.reset()["task"]
    env.load_state(state)
    assert torch.equal(env.reset()["task"], expected)


def test_computed_references_agree_with_simulation():
    env = GridNavi(21_000)
    env.set_seed(0)
    torch.manual_seed(0)
    batch = env.rollout(60, break_when_any_done=False)
    simulated = batch["next", "reward"].view(21_000, 4, 15).sum(-1).mean(0).numpy()
    np.testing.assert_allclose(simulated, random_returns(env), atol=0.05)
    assert told_returns(env)[0] == pytest.approx(np.mean([15 - 1.1 * (x + y - 1) for x, y in env.goals.tolist()]))


def test_explorer_lies_between_random_and_told():
    env = GridNavi(1)
    explored = explorer_returns(env)
    assert random_returns(env).sum() < explored.sum() < told_returns(env).sum()
    assert explored[-1] == pytest.approx(told_returns(env)[-1])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"size": 2}, "size"),
        ({"episodes": 0}, "episodes"),
        ({"reward": "none"}, "reward"),
        ({"show_goal": "x"}, "show_goal"),
    ],
)
def test_bad_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        GridNavi(2, **options)


@pytest.mark.gpu
def test_gpu_trials_equal_cpu_trials():
    cpu, gpu = GridNavi(64), GridNavi(64, device="cuda")
    start, actions = cpu.reset(), torch.randint(5, (64, 60))
    other = start.to("cuda")
    for t in range(60):
        start["action"], other["action"] = actions[:, t], actions[:, t].cuda()
        start, other = cpu.step(start)["next"], gpu.step(other)["next"]
        for key in ("observation", "reward", "episode", "done"):
            assert torch.equal(start[key], other[key].cpu())
