"""The batched engine in lockstep with MiniGrid's package: same levels, same actions, same everything at every step."""

from collections import deque
from functools import cache
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Floor, Key, Lava, Wall
from minigrid.envs import EmptyEnv

from lightning_hyper.envs import MiniGrid
from lightning_hyper.envs.minigrid import SETS
from lightning_hyper.envs.minigrid_batched import BatchedEngine
from lightning_hyper.envs.minigrid_package import PackageEngine, describe
from lightning_hyper.envs.minigrid_rules import covers, sight

TWENTY = SETS["twenty"]
FORWARD, PICK_UP, DROP, TOGGLE, DONE = 2, 3, 4, 5, 6
SHOWN = ("image", "direction", "mission", "steps")


def engines(tasks, num_envs, levels=64):
    described = [describe(task) for task in tasks]
    task = torch.arange(num_envs) % len(described)
    return PackageEngine(described, task), BatchedEngine(described, task, levels, torch.device("cpu"))


def start(pair, rows, levels):
    for engine in pair:
        engine.start(torch.tensor(rows), torch.tensor(levels))
    compare(pair)


def compare(pair, said=""):
    for name in SHOWN:
        theirs, mine = (getattr(engine, name) for engine in pair)
        assert mine.dtype == theirs.dtype
        if not torch.equal(mine, theirs):
            row = (mine != theirs).flatten(1 if mine.dim() > 1 else 0).reshape(len(mine), -1).any(1).nonzero()[0].item()
            raise AssertionError(f"{name} of {pair[0].tasks[row % len(pair[0].tasks)].id} differs {said}")


def step(pair, action, said=""):
    """One frame of both; gives rewards and ends."""
    theirs, mine = (engine.step(action) for engine in pair)
    for name, their, my in zip(("reward", "terminated", "truncated"), theirs, mine, strict=True):
        assert my.dtype == their.dtype
        rows = (my != their).nonzero().flatten().tolist()
        assert not rows, f"{name} of {[pair[0].tasks[row % len(pair[0].tasks)].id for row in rows]} differs {said}"
    compare(pair, said)
    return mine


class Random:
    """Any action, forward as often as all others."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, env):
        return FORWARD if self.rng.random() < 0.5 else self.rng.integers(7)

    def restart(self):
        pass


class Busybody(Random):
    """Walks up to whatever it can reach and meddles with it: this opens doors, moves things and solves tasks."""

    def restart(self):
        self.plan = deque()

    def __call__(self, env):
        if not self.plan:
            self.plan.extend(self.make_plan(env))
        return self.plan.popleft()

    def make_plan(self, env):
        if self.rng.random() < 0.1:
            return self.rng.integers(0, 7, 2)
        start_at = tuple(map(int, env.agent_pos))
        came, queue, targets = {start_at: None}, deque([start_at]), []
        while queue:
            x, y = queue.popleft()
            for place in ((x + 1, y), (x, y + 1), (x - 1, y), (x, y - 1)):
                if place in came or not (0 <= place[0] < env.width and 0 <= place[1] < env.height):
                    continue
                thing = env.grid.get(*place)
                if thing is None or (thing.can_overlap() and thing.type not in ("goal", "lava")):
                    came[place] = (x, y)
                    queue.append(place)
                if thing is not None and thing.type != "wall":
                    targets += [((x, y), place)] * self.interest(env, thing)
                elif thing is None:
                    targets.append(((x, y), place))
        if not targets:
            return [FORWARD]
        stand, target = targets[self.rng.integers(len(targets))]
        path = [target]
        while stand is not None:
            path.append(stand)
            stand = came[stand]
        path.reverse()
        actions, direction = [], env.agent_dir
        for here, there in pairwise(path):
            wanted = ((1, 0), (0, 1), (-1, 0), (0, -1)).index((there[0] - here[0], there[1] - here[1]))
            actions += {0: [], 1: [1], 2: [1, 1], 3: [0]}[(wanted - direction) % 4]
            direction = wanted
            actions.append(FORWARD)
        return [*actions[:-1], *self.meddle(env, env.grid.get(*target))]

    def interest(self, env, thing):
        if thing.type == "door" and thing.is_locked:
            held = env.carrying
            if held is None:
                return 1
            return 60 if (held.type, held.color) == ("key", thing.color) else 8
        return 1 if thing.type == "lava" else 8

    def meddle(self, env, thing):
        kind = None if thing is None else thing.type
        # What is held is laid aside for what is found.
        take = [1, DROP, 0, PICK_UP] if env.carrying else [PICK_UP]
        options = {
            None: [[DROP], [FORWARD], [DROP, PICK_UP]],
            "door": [[TOGGLE, FORWARD], [TOGGLE, FORWARD, FORWARD], [TOGGLE, TOGGLE], [DONE]],
            "key": [take, take, [PICK_UP, DROP], [DONE]],
            "ball": [take, take, [PICK_UP], [DONE]],
            "box": [take, [TOGGLE, PICK_UP], [DONE]],
        }.get(kind, [[FORWARD]])
        return options[self.rng.integers(len(options))]


def lockstep(tasks, steps, policy, seed=0, copies=1):
    """Play both engines; gives successes and other ends of each task."""
    rng = np.random.default_rng(seed)
    n = len(tasks) * copies
    pair = engines(tasks, n)
    for engine in pair:
        engine.seed = seed
    policies = [policy(rng) for _ in range(n)]
    successes, ends = np.zeros((2, len(tasks)), dtype=int)

    def begin(rows):
        start(pair, rows, rng.integers(0, 64, len(rows)).tolist())
        for row in rows:
            policies[row].restart()

    begin(list(range(n)))
    for t in range(steps):
        action = torch.tensor([int(choose(env)) for choose, env in zip(policies, pair[0].envs, strict=True)])
        reward, terminated, truncated = step(pair, action, f"at step {t}")
        done = (terminated | truncated).nonzero().flatten().tolist()
        for row in done:
            (successes if reward[row] > 0 else ends)[row % len(tasks)] += 1
        if done:
            begin(done)
    return successes, ends


def test_random_episodes_of_the_twenty_tasks():
    _, ends = lockstep(TWENTY, 700, Random)
    assert ends.sum() > 20


def test_episodes_that_meddle_with_everything():
    successes, ends = lockstep(TWENTY, 1500, Busybody)
    for task, success, end in zip(TWENTY, successes, ends, strict=True):
        assert success, task
        assert success + end >= 2, task


class Porter(Busybody):
    """Carries things about, and seldom says that it is done."""

    def meddle(self, env, thing):
        if self.rng.random() < 0.03:
            return [DONE]
        if thing is None:
            return [DROP] if env.carrying else [FORWARD]
        return [PICK_UP, FORWARD] if self.rng.random() < 0.7 else [PICK_UP, DROP]


def test_things_that_are_carried_about_near_what_is_to_be_found():
    successes, ends = lockstep(
        ["MiniGrid-GoToObject-6x6-N2-v0", "MiniGrid-GoToObject-8x8-N2-v0"], 800, Porter, copies=8
    )
    assert successes.min() > 5
    assert ends.min() > 5


class Jumble(EmptyEnv):
    """Everything there is, everywhere."""

    def __init__(self, **options):
        super().__init__(size=12, agent_start_pos=None, max_steps=300, **options)
        self.see_through_walls = False

    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        for _ in range(7):
            doors = [Door(self._rand_color(), *state) for state in ((), (True,), (False, True))]
            keys = [Key(self._rand_color()) for _ in range(3)]
            boxes = [Box(self._rand_color()), Box(self._rand_color(), Key(self._rand_color()))]
            for thing in (*doors, *keys, *boxes, Ball(self._rand_color()), Floor(self._rand_color()), Wall()):
                self.place_obj(thing)
        self.place_obj(Lava())


def test_all_kinds_and_colours_of_things():
    task = "MiniGrid-Jumble-Test-v0"
    gymnasium.register(task, Jumble)
    try:
        lockstep([task], 500, Busybody, copies=12)
    finally:
        del gymnasium.registry[task]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_episodes(seed):
    successes, ends = lockstep(TWENTY, 4000, Busybody, seed, copies=2)
    assert successes.sum() + ends.sum() > 1000


def test_every_covered_task_of_the_package():
    found = []
    for name in gymnasium.registry:
        if name.startswith("MiniGrid-") and "WFC" not in name and "Dynamic" not in name:
            found.append(name)
    covered = [name for name in found if covers(describe(name))]
    assert {name.rsplit("-", 3)[0] for name in set(found) - set(covered)} == {"MiniGrid-PutNear"}
    lockstep(covered, 120, Busybody)


@cache
def single(task):
    return engines([task], 1)


@settings(max_examples=150, deadline=None, database=None)
@given(
    task=st.sampled_from(TWENTY),
    level=st.integers(0, 2**31),
    moves=st.lists(st.tuples(st.sampled_from((FORWARD, 0, 1, TOGGLE, PICK_UP, DROP, DONE)), st.integers(1, 4))),
)
def test_any_actions_on_any_level(task, level, moves):
    pair = single(task)
    start(pair, [0], [level])
    for action, times in moves:
        for _ in range(times):
            _, terminated, truncated = step(pair, torch.tensor([action]))
            if terminated or truncated:
                return


def test_sight_is_the_packages():
    following, seen = (table.numpy() for table in sight())
    rng = np.random.default_rng(0)
    bits = 2 ** np.arange(7)
    for density in np.linspace(0, 1, 400):
        grid = Grid(7, 7)
        # Whatever stands at the agent's own cell, too.
        for x, y in np.argwhere(rng.random((7, 7)) < density):
            grid.set(int(x), int(y), (Wall(), Door("red"), Door("red", is_open=True), Ball())[rng.integers(4)])
        hides = np.array(
            [[(cell := grid.get(x, y)) is not None and not cell.see_behind() for x in range(7)] for y in range(7)]
        )
        expected = grid.process_vis((3, 6))
        reached = 128 * 2**3
        for y in range(6, -1, -1):
            key = reached + (hides[y] * bits).sum()
            assert (seen[key : key + 1].view(np.uint8)[:7] == 255 * expected[:, y]).all()
            reached = following[key]


def test_stepping_on_after_the_end_does_not_fail():
    pair = engines(TWENTY, 20)
    pair[1].start(torch.arange(20), torch.arange(20))
    for action in torch.randint(7, (1400, 20), generator=torch.Generator().manual_seed(0)):
        truncated = pair[1].step(action)[2]
    assert truncated.all()


def test_levels_are_made_when_drawn_and_kept():
    env = MiniGrid(2, tasks=["MiniGrid-FourRooms-v0"], levels=8, refresh=2)
    env.set_seed(1)
    made, make = [], env.engine.levels._make

    def counted(task, slot, level):
        made.append(level)
        make(task, slot, level)

    env.engine.levels._make = counted
    for _ in range(30):
        env.begin()
    assert len(made) == len(set(made))
    assert max(made) >= 29
    # The same seed keeps them, another makes its own.
    env.set_seed(1)
    late = max(made)
    env.engine.start(torch.tensor([0]), torch.tensor([late]))
    assert len(made) == len(set(made))
    env.set_seed(2)
    env.engine.start(torch.tensor([0]), torch.tensor([late]))
    assert made[-1] == late


def test_a_task_that_is_not_covered_falls_back_to_the_package(caplog):
    with caplog.at_level("INFO"):
        env = MiniGrid(2, tasks=["MiniGrid-PutNear-6x6-N2-v0", "MiniGrid-Unlock-v0"])
    assert isinstance(env.engine, PackageEngine)
    assert "does not know the rules of MiniGrid-PutNear-6x6-N2-v0;" in caplog.text
    assert isinstance(MiniGrid(2, tasks=["MiniGrid-Unlock-v0"]).engine, BatchedEngine)


class Surprise(EmptyEnv):
    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        self.put_obj(Box("red", Ball("blue")), 2, 2)


def test_a_level_with_unknown_things_names_the_way_out():
    gymnasium.register("MiniGrid-Surprise-Test-v0", Surprise)
    try:
        env = MiniGrid(1, tasks=["MiniGrid-Surprise-Test-v0"])
        with pytest.raises(ValueError, match=r"does not know .*box with a ball.*set data.env.engine to minigrid"):
            env.begin()
    finally:
        del gymnasium.registry["MiniGrid-Surprise-Test-v0"]


def test_a_step_compiles_to_one_graph_that_steps_alike():
    plain, compiled = MiniGrid(14, levels=4), MiniGrid(14, levels=4)
    for env in (plain, compiled):
        env.set_seed(0)
        env.begin()
    graph = torch.compile(compiled.engine.step, backend="eager", fullgraph=True, dynamic=False)
    for _ in range(30):
        action = torch.randint(7, (14,))
        for theirs, mine in zip(plain.engine.step(action), graph(action), strict=True):
            assert torch.equal(theirs, mine)
        assert torch.equal(plain.engine.image, compiled.engine.image)


@pytest.mark.gpu
def test_gpu_steps_equal_cpu_steps():
    cpu, gpu = MiniGrid(40, tasks="twenty"), MiniGrid(40, tasks="twenty", device="cuda")
    generator = torch.Generator().manual_seed(0)
    for env in (cpu, gpu):
        env.set_seed(0)
        env.begin()
    for _ in range(300):
        action = torch.randint(7, (40,), generator=generator)
        found = []
        for env in (cpu, gpu):
            step = env.advance(action.to(env.device))
            env.begin(step["done"].flatten())
            found.append(step)
        for key, entry in found[0].items():
            assert torch.equal(entry, found[1][key].cpu()), key
