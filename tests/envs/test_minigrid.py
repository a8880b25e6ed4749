"""MiniGrid's episodes are the package's own, and their levels are drawn as the recipe says."""

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from lightning_hyper.envs import MiniGrid
from lightning_hyper.envs.minigrid import SETS, max_steps
from lightning_hyper.envs.minigrid_package import level_seed

ENGINES = ("batched", "minigrid")
# Their episodes are short, so that resets are many.
SHORT = ("MiniGrid-MultiRoom-N2-S4-v0", "MiniGrid-Fetch-5x5-N2-v0", "MiniGrid-GoToDoor-5x5-v0")


def actions_for(env, steps, seed=0):
    """Random actions, of which every other is forward."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(7, (steps, *env.batch_size), generator=generator)
    return torch.where(torch.rand(drawn.shape, generator=generator) < 0.5, 2, drawn)


def started(env, seed=0):
    env.set_seed(seed)
    return env.begin()


def record_levels(env):
    """Lists of the levels that each reset draws, by task."""
    drawn, draw = [[] for _ in env.tasks], env.draw

    def recorded(rows):
        levels = draw(rows)
        for row, level in zip(rows.tolist(), levels.tolist(), strict=True):
            drawn[row % len(env.tasks)].append(level)
        return levels

    env.draw = recorded
    return drawn


@pytest.mark.parametrize("engine", ENGINES)
def test_specs_hold(engine):
    env = MiniGrid(8, engine=engine)
    check_env_specs(env)
    assert env.action_spec.space.n == 7
    assert env.observation_spec["task"].space.n == 7
    assert env.observation_spec["mission"].space.n == sum(map(len, env.missions))
    assert env.begin()["task"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    check_env_specs(MiniGrid(2, tasks=["MiniGrid-Empty-5x5-v0"], engine=engine))


def test_sets_are_the_papers_with_their_step_limits():
    assert [len(SETS[name]) for name in ("three", "five", "seven", "twelve", "twenty")] == [3, 5, 7, 12, 20]
    assert [max_steps(task) for task in SETS["seven"]] == [360, 252, 720, 196, 605, 324, 40]
    assert set(SETS["three"]) < set(SETS["five"]) < set(SETS["seven"]) < set(SETS["twelve"]) < set(SETS["twenty"])
    assert MiniGrid(7).horizon == 720


def test_missions_are_those_of_the_mission_space():
    env = MiniGrid(2, tasks=["MiniGrid-GoToDoor-5x5-v0", "MiniGrid-Fetch-5x5-N2-v0"])
    colours = ("blue", "green", "grey", "purple", "red", "yellow")
    assert env.missions[0] == tuple(f"go to the {colour} door" for colour in colours)
    assert len(set(env.missions[1])) == 5 * 6 * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_equals_the_packages(engine):
    env = MiniGrid(20, tasks="twenty", engine=engine, levels=5)
    levels = record_levels(env)
    step = started(env, 3)
    others = [gymnasium.make(task, disable_env_checker=True) for task in env.tasks]
    texts = [text for missions in env.missions for text in missions]

    def begin(row):
        return others[row].reset(seed=level_seed(3, levels[row][-1]))[0]

    def check(entries, row, observation):
        assert np.array_equal(entries["observation"][row], observation["image"])
        assert entries["direction"][row].item() == observation["direction"]
        assert texts[entries["mission"][row].item()] == observation["mission"]

    for row in range(20):
        check(step, row, begin(row))
    ends = torch.zeros(2)
    for action in actions_for(env, 260):
        after = env.advance(action)
        over = after["done"].flatten()
        step = env.begin(over) if over.any() else after
        for row, other in enumerate(others):
            observation, reward, terminated, truncated, _ = other.step(action[row].item())
            check(after, row, observation)
            assert after["reward"][row].item() == np.float32(reward)
            assert after["terminated"][row].item() == terminated
            assert after["truncated"][row].item() == (truncated and not terminated)
            assert after["done"][row].item() == (terminated or truncated)
            if terminated or truncated:
                check(step, row, begin(row))
        ends += torch.stack((after["terminated"].sum(), after["truncated"].sum()))
    assert ends.min() >= 5


@pytest.mark.parametrize("engine", ENGINES)
def test_beginning_some_leaves_the_others_alone(play, engine):
    tasks = ["MiniGrid-FourRooms-v0", "MiniGrid-KeyCorridorS3R3-v0"]
    env, alone = (MiniGrid(4, tasks=tasks, engine=engine) for _ in range(2))
    for one in (env, alone):
        started(one)
        following = play(one, actions_for(env, 20))
    after = env.begin(torch.tensor([False, True, False, True]))
    for key, entry in after.items():
        assert torch.equal(entry[[0, 2]], following[key][-1][[0, 2]]), key
    assert after["step_count"].squeeze(-1).tolist() == [20, 0, 20, 0]
    # And the episodes that were left alone go on as they would have.
    expected, found = (play(one, actions_for(env, 30, 1)) for one in (alone, env))
    for key in ("observation", "direction", "reward"):
        assert torch.equal(found[key][:, [0, 2]], expected[key][:, [0, 2]])


@pytest.mark.parametrize("engine", ENGINES)
def test_returned_entries_are_not_changed_by_later_steps(play, engine):
    env = MiniGrid(3, tasks=SHORT, engine=engine)
    started(env)
    kept = env.advance(actions_for(env, 1)[0])
    copy = {key: entry.clone() for key, entry in kept.items()}
    play(env, actions_for(env, 60))
    env.begin()
    for key, entry in copy.items():
        assert torch.equal(kept[key], entry), key


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fresh_object_continues_bit_for_bit(continues, engine):
    tasks = [*SHORT, "MiniGrid-KeyCorridorS3R1-v0"]
    env, other = (MiniGrid(6, tasks=tasks, engine=engine, levels=7, refresh=3) for _ in range(2))
    started(env, 5)
    continues(env, other, actions_for(env, 200), 70)


@pytest.mark.parametrize("engine", ENGINES)
def test_loading_replaces_an_episode_under_way(play, engine):
    env = MiniGrid(3, tasks=SHORT, engine=engine)
    started(env, 1)
    play(env, actions_for(env, 15))
    state = env.save_state()
    expected = play(env, actions_for(env, 40, 2))
    env.load_state(state)
    found = play(env, actions_for(env, 40, 2))
    for key, entry in expected.items():
        assert torch.equal(found[key], entry), key


@pytest.mark.parametrize("engine", ENGINES)
def test_seeds_reproduce_and_differ(engine):
    env = MiniGrid(40, tasks=["MiniGrid-FourRooms-v0"], engine=engine)
    starts = [started(env, seed)["observation"] for seed in (3, 3, 4)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_resets_draw_all_levels_evenly():
    env = MiniGrid(2, tasks=SHORT[:2], levels=4)
    env.set_seed(0)
    drawn = torch.stack([env.draw(torch.tensor([0, 1])) for _ in range(4000)])
    for column in drawn.unbind(1):
        counts = column.bincount(minlength=4)
        assert len(counts) == 4
        # Five standard deviations of a binomial count.
        assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_a_level_gives_way_after_as_many_resets_of_its_task():
    env = MiniGrid(3, tasks=SHORT[:2], levels=3, refresh=10)
    env.set_seed(0)
    # Task 0 has two of the three environments.
    for reset in range(100):
        levels = env.draw(torch.arange(3))
        for row, resets in ((0, 2 * reset), (1, reset), (2, 2 * reset)):
            assert resets // 10 <= levels[row] < resets // 10 + 3
    late = torch.stack([env.draw(torch.tensor([1])) for _ in range(10)])
    assert late.min() >= 10


def test_each_task_has_its_own_limit():
    tasks = ["MiniGrid-Empty-5x5-v0", "MiniGrid-MultiRoom-N2-S4-v0"]
    env = MiniGrid(2, tasks=tasks)
    assert [max_steps(task) for task in tasks] == [100, 40]
    started(env)
    truncated = torch.stack([env.advance(torch.zeros(2, dtype=torch.int64))["truncated"] for _ in range(100)])
    assert truncated.int().argmax(0).flatten().tolist() == [99, 39]


@pytest.mark.parametrize("engine", ["batched", "minigrid"])
def test_an_absent_task_is_known_but_not_played(engine):
    env = MiniGrid(4, tasks=SHORT, absent=SHORT[1:2], engine=engine)
    other = MiniGrid(4, tasks=(SHORT[0], *SHORT[2:]), engine=engine)
    assert env.tasks == tuple(SHORT)
    rest = [k for k in range(len(SHORT)) if k != 1]
    step, those = started(env), started(other)
    assert step["task"].tolist() == [rest[k % len(rest)] for k in range(4)]
    assert torch.equal(step["observation"], those["observation"])
    texts, others = ([text for task in one.missions for text in task] for one in (env, other))
    assert [texts[k] for k in step["mission"]] == [others[k] for k in those["mission"]]


def test_a_state_of_another_engine_is_refused():
    state = MiniGrid(3, tasks=SHORT, engine="minigrid").save_state()
    with pytest.raises(
        ValueError, match=r"ckpt_path: its MiniGrid episodes were saved with other options of data\.env"
    ):
        MiniGrid(3, tasks=SHORT, engine="batched").load_state(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "eight"}, "data.env.tasks is 'eight'; it must be one of three, five, seven, twelve, twenty"),
        ({"tasks": ["MiniGrid-DoorKey-6x7-v0"]}, "'MiniGrid-DoorKey-6x7-v0' is no id .* MiniGrid-DoorKey-6x6-v0"),
        ({"tasks": ["CartPole-v1"]}, "'CartPole-v1' is no id of the minigrid package"),
        ({"tasks": []}, "data.env.tasks is .*at least one id"),
        ({"tasks": ["MiniGrid-Unlock-v0"] * 2}, "none of them twice"),
        ({"tasks": ["BabyAI-GoToLocal-v0"]}, "BabyAI-GoToLocal-v0 makes its missions up with its levels"),
        (
            {"tasks": ["MiniGrid-WFC-MazeSimple-v0"]},
            "the minigrid package cannot make MiniGrid-WFC-MazeSimple-v0: .*wave function collapse, .* not installed$",
        ),
        ({"tasks": ["MiniGrid-Dynamic-Obstacles-5x5-v0"]}, "has a view of 7x7 cells and 3 actions"),
        ({"num_envs": 6}, "data.env.num_envs is 6, but data.env.tasks lists 7.*must be at least 7"),
        ({"absent": ["MiniGrid-Unlock-v0"]}, r"data.env.absent is \['MiniGrid-Unlock-v0'\]; .*some of data.env.tasks"),
        ({"tasks": SHORT, "absent": SHORT}, "data.env.absent is .*some of data.env.tasks"),
        ({"levels": 0}, "MiniGrid.levels is 0"),
        ({"refresh": 0}, "MiniGrid.refresh is 0"),
        ({"engine": "fast"}, "MiniGrid.engine is 'fast'; it must be one of batched, minigrid"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        MiniGrid(**options)


def test_a_task_with_another_view_is_refused():
    task = "MiniGrid-Narrow-Test-v0"
    gymnasium.register(task, "minigrid.envs:EmptyEnv", kwargs={"size": 5, "agent_view_size": 5})
    try:
        with pytest.raises(ValueError, match="has a view of 5x5 cells and 7 actions; all tasks must have 7x7 cells"):
            MiniGrid(1, tasks=[task])
    finally:
        del gymnasium.registry[task]
