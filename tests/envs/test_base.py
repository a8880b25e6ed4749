"""What is true of every environment."""

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from lightning_hyper import envs
from lightning_hyper.envs import GridNavi, Gym, Hopper, MineMaze, MiniGrid, Pendulum, TMaze, Trials

MAKE = {
    "GridNavi": lambda n: GridNavi(n, episode_steps=6),
    "Trials": lambda n: Trials(lambda **o: GridNavi(**o, episode_steps=4), num_envs=n),
    "Pendulum": lambda n: Pendulum(n, episode_steps=7),
    "Hopper": lambda n: Hopper(n, episode_steps=9),
    "MiniGrid": lambda n: MiniGrid(n, tasks=["MiniGrid-Fetch-5x5-N2-v0", "MiniGrid-MultiRoom-N2-S4-v0"]),
    "TMaze": lambda n: TMaze(n, length=4),
    "TrialsOfMineMaze": lambda n: Trials(lambda **o: MineMaze(**o, kind="LS", rooms=2), num_envs=n),
    "Gym": lambda n: Gym("CartPole-v1", n),
    "TrialsOfGym": lambda n: Trials(
        lambda **o: Gym("CartPole-v1", **o, tasks=[{}, {"sutton_barto_reward": True}]), num_envs=n
    ),
    "TrialsOfMiniGrid": lambda n: Trials(
        lambda **o: MiniGrid(**o, tasks=["MiniGrid-MultiRoom-N2-S4-v0"]), 2, "last", n
    ),
}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def actions_for(env, steps):
    torch.manual_seed(1)
    return [env.action_spec.rand() for _ in range(steps)]


@pytest.mark.parametrize(
    "name", [name for name in envs.__all__ if name not in ("BatchedEnv", "MuJoCo", "Spaces", "Step", "Trials")]
)
def test_specs_hold_of_every_exported_environment(name):
    options = {"Gym": {"id": "CartPole-v1"}}.get(name, {})
    check_env_specs(getattr(envs, name)(num_envs=8, **options))


def test_specs_hold(make):
    check_env_specs(make(3))


def test_entries_are_those_of_the_contract(make):
    env = make(3)
    action = env.action_spec.rand()
    begun = env.begin()
    step = env.advance(action)
    assert set(step) - set(begun) == {"reward", "done", "terminated", "truncated"}
    listed = set(envs.Step.__annotations__) | {"direction"}
    assert set(step) <= listed
    assert set(env.observation_spec.keys()) == set(begun)
    for name in ("is_init", "done", "terminated", "truncated"):
        assert (step[name].dtype, step[name].shape) == (torch.bool, (3, 1))
    for name in ("previous_reward", "episode_return", "reward"):
        assert (step[name].dtype, step[name].shape) == (torch.float32, (3, 1))
    assert (step["step_count"].dtype, step["step_count"].shape) == (torch.int64, (3, 1))
    assert env.has_tasks == ("task" in env.observation_spec.keys())  # noqa: SIM118  a spec has no len


def test_counters_are_those_of_a_loop(make):
    env = make(3)
    env.set_seed(0)
    step = env.begin()
    counts, returns = [0] * 3, [0.0] * 3
    ends = 0
    for action in actions_for(env, 150):
        assert (step["is_init"].flatten() == torch.tensor([count == 0 for count in counts])).all()
        for row in step["is_init"].flatten().nonzero().flatten().tolist():
            assert step["previous_action"][row].abs().sum() == 0
            assert step["previous_reward"][row] == 0
        step = env.advance(action)
        for row in range(3):
            counts[row] += 1
            returns[row] += step["reward"][row].item()
            assert step["step_count"][row].item() == counts[row] <= env.horizon
            assert step["episode_return"][row].item() == pytest.approx(returns[row], rel=1e-5, abs=1e-5)
            assert torch.equal(step["previous_action"][row], action[row])
            assert step["previous_reward"][row] == step["reward"][row]
            assert step["done"][row].item() == (step["terminated"][row] | step["truncated"][row]).item()
            assert not (step["terminated"][row] & step["truncated"][row]).item()
        assert not step["is_init"].any()
        if step["done"].any():
            over = step["done"].flatten()
            ends += int(over.sum())
            for row in over.nonzero().flatten().tolist():
                counts[row], returns[row] = 0, 0.0
            step = env.begin(over)
    assert ends >= 3


def test_beginning_some_leaves_the_others_alone(make):
    env, alone = make(4), make(4)
    first, second = actions_for(env, 3), actions_for(env, 3)
    for one in (env, alone):
        one.set_seed(3)
        one.begin()
        for action in first:
            shown = one.advance(action)
    rows = torch.tensor([False, True, False, True])
    after = env.begin(rows)
    for key, entry in after.items():
        assert torch.equal(entry[~rows], shown[key][~rows]), key
        assert torch.equal(env.current[key], entry), key
    assert after["step_count"].flatten().tolist() == [3, 0, 3, 0]
    # And those that were left alone go on as they would have.
    for action in second:
        found, expected = env.advance(action), alone.advance(action)
        # Later starts are drawn from a generator that went on differently.
        if expected["done"].any() or expected.get("episode_done", torch.zeros(1)).any():
            break
        for key in ("observation", "reward", "done", "episode_return"):
            assert torch.equal(found[key][~rows], expected[key][~rows]), key


def test_entries_that_were_given_away_are_not_changed(make):
    env = make(3)
    step = env.begin()
    kept, copies = [step], [{key: entry.clone() for key, entry in step.items()}]
    for action in actions_for(env, 12):
        for step in (env.advance(action), env.begin(torch.tensor([True, False, False]))):
            kept.append(step)
            copies.append({key: entry.clone() for key, entry in step.items()})
    for one, copy in zip(kept, copies, strict=True):
        for key, entry in one.items():
            assert torch.equal(entry, copy[key]), key


def test_what_is_added_to_a_step_stays_out_of_current(make):
    env = make(2)
    env.begin()["action"] = env.action_spec.rand()
    assert "action" not in env.current


def test_stepping_beyond_done_does_not_fail(make):
    env = make(3)
    env.begin()
    for action in actions_for(env, 60):
        env.advance(action)


def test_torchrls_interface_gives_the_same(make):
    env, plain = make(3), make(3)
    for one in (env, plain):
        one.set_seed(4)
    step, shown = env.reset(), plain.begin()
    for action in actions_for(env, 40):
        for key, entry in shown.items():
            assert torch.equal(step[key], entry), key
        full, step = env.step_and_maybe_reset(step.set("action", action))
        shown = plain.advance(action)
        for key, entry in shown.items():
            assert torch.equal(full["next", key], entry), key
        shown = plain.begin(shown["done"].flatten()) if shown["done"].any() else dict(plain.current)


def test_seeds_reproduce_and_differ():
    for env in (Pendulum(8), Hopper(8), GridNavi(8), Gym("CartPole-v1", 8)):
        starts = []
        for seed in (3, 3, 4):
            env.set_seed(seed)
            step = env.begin()
            starts.append(step["task"] if env.has_tasks else step["observation"])
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])


def test_a_fresh_object_continues_bit_for_bit(make, continues):
    env, other = make(3), make(3)
    env.set_seed(5)
    env.begin()
    continues(env, other, actions_for(env, 250), 33)


def test_a_saved_state_is_data(make, tmp_path):
    env = make(3)
    env.begin()
    torch.save(env.save_state(), tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    env.load_state(read)


def test_a_state_of_another_width_is_refused():
    env = Pendulum(3)
    env.begin()
    with pytest.raises(
        ValueError, match=r"ckpt_path: it was saved with 3 environments \(data.env.num_envs\), .* 2 now"
    ):
        Pendulum(2).load_state(env.save_state())


def test_the_same_task_is_kept_on_request():
    env = GridNavi(200)
    goals = env.begin()["task"]
    assert torch.equal(env.begin(same_task=True)["task"], goals)
    assert not torch.equal(env.begin()["task"], goals)


def test_advance_needs_a_beginning():
    with pytest.raises(RuntimeError, match=r"begin\(\) comes first"):
        Pendulum(1).advance(torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("family", "key"),
    [(Pendulum, "num_envs"), (Pendulum, "episode_steps"), (Hopper, "threads"), (GridNavi, "episode_steps")],
)
def test_bad_counts_name_the_key(family, key):
    with pytest.raises(ValueError, match=rf"{family.__name__}.{key} is 0; it must be a whole number from 1"):
        family(**{key: 0})
