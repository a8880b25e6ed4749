"""The T-maze pays for a cue that was remembered."""

import pytest
import torch

from lightning_hyper.envs import Spaces, TMaze, Trials

RIGHT, UP, LEFT, DOWN = range(4)


def episode(env, actions):
    """Steps of all environments under the same actions."""
    return [env.advance(torch.full(env.batch_size, action)) for action in actions]


def begun(cues=(1.0, -1.0), **options):
    """T-mazes with given cues."""
    env = TMaze(len(cues), **options)
    env.begin()
    state = env.save_state()
    state["cue"] = torch.tensor(cues).unsqueeze(-1)
    state["current"]["observation"][:, 1] = state["current"]["task"][:, 0] = torch.tensor(cues)
    env.load_state(state)
    return env


@pytest.mark.parametrize("length", [1, 10, 1_000])
def test_the_cue_s_branch_pays_one_and_the_other_nothing_after_the_whole_corridor(length):
    steps = episode(begun(length=length), [RIGHT] * length + [UP])
    assert [step["done"].all().item() for step in steps] == [False] * length + [True]
    assert steps[-1]["terminated"].all()
    assert steps[-1]["episode_return"].flatten().tolist() == [1.0, 0.0]


def test_without_memory_half_is_earned():
    env = TMaze(2)
    env.in_turn = True
    for branch in (UP, DOWN):
        env.begin()
        assert episode(env, [RIGHT] * 10 + [branch])[-1]["episode_return"].mean() == 0.5


def test_the_cue_is_shown_once_and_the_end_is_seen():
    env = begun(length=2)
    assert env.current["observation"].tolist() == [[0, 1], [0, -1]]
    shown = [step["observation"][1].tolist() for step in episode(env, [LEFT, RIGHT, RIGHT])]
    assert shown == [[0, 0], [0, 0], [1, 0]]
    shown = [step["observation"][1].tolist() for step in episode(begun(length=2), [RIGHT, RIGHT, DOWN])]
    assert shown == [[0, 0], [1, 0], [1, -1]]


def test_walls_stop_moves():
    env = begun(length=2)
    moves = [(UP, (0, 0)), (LEFT, (0, 0)), (RIGHT, (1, 0)), (DOWN, (1, 0)), (RIGHT, (2, 0)), (RIGHT, (2, 0))]
    moves += [(UP, (2, 1)), (UP, (2, 1)), (LEFT, (2, 1)), (DOWN, (2, 0)), (DOWN, (2, -1)), (DOWN, (2, -1))]
    for action, place in moves:
        episode(env, [action])
        assert tuple(env.save_state()["position"][0].tolist()) == place
        assert tuple(env.places()[0]) == place  # a map is 2 wide


def test_a_frame_behind_time_costs_its_share_and_standing_still_costs_all():
    rewards = [step["reward"][0].item() for step in episode(begun(length=4), [RIGHT, LEFT, RIGHT, RIGHT, UP])]
    assert rewards == pytest.approx([0, -0.25, -0.25, -0.25, 0])
    assert episode(begun(length=4), [UP] * 5)[-1]["episode_return"][0].item() == pytest.approx(-1)
    assert episode(begun(length=4, penalty=0.0), [UP] * 5)[-1]["episode_return"][0].item() == 0


def test_cues_are_up_and_down_equally_often_and_a_trial_keeps_its_own():
    env = Trials(lambda **o: TMaze(**o, length=2), 3, num_envs=10_000)
    env.set_seed(0)
    first = env.begin()
    assert set(first["task"].flatten().tolist()) == {1.0, -1.0}
    assert abs(first["task"].sum().item()) < 5 * 10_000**0.5
    steps = episode(env, [RIGHT] * 9)
    for step in steps:
        assert torch.equal(step["task"], first["task"])
    # The next episode of the trial shows the cue again.
    assert torch.equal(steps[2]["observation"], first["observation"])
    assert steps[-1]["done"].all()


def test_a_maze_goes_on_exactly_where_it_was_saved(continues):
    drawn = torch.randint(8, (30, 5), generator=torch.Generator().manual_seed(0))
    actions = torch.where(drawn < 4, drawn, RIGHT)  # mostly, so that ends are reached
    for make in (lambda: TMaze(5, length=6), lambda: Trials(lambda **o: TMaze(**o, length=6), 2, num_envs=5)):
        env = make()
        env.begin()
        continues(env, make(), actions, 10)


def test_spaces():
    spaces = Spaces.of(TMaze(2, length=7))
    assert (spaces.observation, spaces.actions, spaces.discrete, spaces.horizon, spaces.task) == ((2,), 4, True, 8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "TMaze.length is 0; it must be a whole number from 1"),
        ({"penalty": -1.0}, "TMaze.penalty is -1.0; it must be a number from 0"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        TMaze(2, **options)


def test_the_map_has_the_corridor_and_a_star_in_the_right_branch():
    from matplotlib.figure import Figure

    for cue in (1.0, -1.0):
        axes = Figure().subplots()
        begun((cue,), length=5).draw_map(axes)
        (star,) = [line for line in axes.lines if line.get_marker() == "*"]
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, cue)
