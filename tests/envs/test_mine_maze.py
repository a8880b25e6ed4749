"""The mine mazes pay, show and end as published."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_hyper.envs import MineMaze, Spaces, Trials
from lightning_hyper.envs.mine_maze import KINDS
from lightning_hyper.envs.mine_maze_panels import NAMES, are_published, voxel_panels

LEFT, FORWARD, RIGHT = range(3)


def route(env, last):
    """The shortest way of the first environment: each pillar passed on its side, `last` (the final turn) at the end."""
    pillars = int(env.save_state()["pillars"][0])
    actions = [RIGHT] * len(env.kind.signals[0])
    for room in range(env.rooms):
        side = RIGHT if pillars >> room & 1 else LEFT
        actions += [FORWARD, side, FORWARD, FORWARD, RIGHT + LEFT - side, FORWARD]
    return [*actions, last]


def taken(env, actions):
    return [env.advance(torch.full(env.batch_size, action)) for action in actions]


def shown_pixels(step):
    """The first environment's observation as bytes, the top row first, as a screenshot has it."""
    image = step["observation"][0].view(10, 10, 3).numpy() * 128 + 128
    return np.flip(image, 0).round().astype(np.uint8)


class Plain:
    """One maze as a loop over the published description."""

    def __init__(self, signal, pillars, hidden=False):
        self.signal, self.pillars, self.hidden = signal, pillars, hidden
        self.up = signal in (("green",), ("green", "red"))
        self.phase, self.x, self.y, self.room, self.frame = "signal", 0, 0, 0, 0

    def panel(self):
        if self.phase == "signal":
            return "black" if self.hidden else self.signal[self.x]
        return f"room{self.pillars[self.room]}/{self.x},{self.y}" if self.phase == "rooms" else "end"

    def step(self, action):
        self.frame += 1
        if self.frame == 200:
            return 0.0, True
        where = (self.x, self.y)
        if self.phase == "signal":
            if action != RIGHT:
                return 0.0, False
            self.x += 1
            if self.x == len(self.signal):
                self.phase, self.x = "rooms", 0
            return 0.1, False
        if self.phase == "end":
            if action == FORWARD:
                return 0.0, False
            return (4.0 if (action == RIGHT) == self.up else -3.0), True
        if where == (0, 1):
            if action == FORWARD:
                return 0.0, False
            self.x = action - 1
            return (0.1 if (action == RIGHT) == bool(self.pillars[self.room]) else 0.0), False
        back = {(-1, 3): RIGHT, (1, 3): LEFT}
        if action != back.get(where, FORWARD):
            return 0.0, False
        if where in back:
            self.x = 0
        else:
            self.y += 1
        if self.y == 4:
            self.room, self.y = self.room + 1, 0
            self.phase = "rooms" if self.room < len(self.pillars) else "end"
        return 0.1, False


@pytest.mark.parametrize("kind", ["LS", "LSO", "LSH"])
@pytest.mark.parametrize("rooms", [2, None])
def test_every_step_is_that_of_a_plain_loop(kind, rooms):
    env = MineMaze(64, kind=kind, rooms=rooms)
    env.set_seed(3)
    step = env.begin()
    state = env.save_state()
    loops = [
        Plain(env.kind.signals[signal], [pillars >> room & 1 for room in range(env.rooms)], kind == "LSH")
        for signal, pillars in zip(state["signal"].tolist(), state["pillars"].tolist(), strict=True)
    ]
    table = dict(zip(NAMES, voxel_panels(10), strict=True)) | {"black": np.zeros((10, 10, 3), np.uint8)}
    over, torch_rng = [False] * 64, torch.Generator().manual_seed(0)
    for _ in range(200):
        for row, loop in enumerate(loops):
            if not over[row]:
                image = step["observation"][row].view(10, 10, 3).numpy() * 128 + 128
                assert np.array_equal(np.flip(image, 0), table[loop.panel()]), loop.panel()
        actions = torch.randint(3, (64,), generator=torch_rng)
        step = env.advance(actions)
        for row, (loop, action) in enumerate(zip(loops, actions.tolist(), strict=True)):
            if not over[row]:
                reward, over[row] = loop.step(action)
                assert step["reward"][row].item() == pytest.approx(reward)
                assert step["done"][row].item() == step["terminated"][row].item() == over[row]
    assert all(over)


@pytest.mark.parametrize(
    ("kind", "frames", "optimum"), [("LS", 98, 13.7), ("LSO", 63, 10.2), ("LSN", 62, 10.1), ("LSH", 98, 13.7)]
)
def test_the_shortest_way_takes_and_earns_what_is_published(kind, frames, optimum):
    for signal in range(len(KINDS[kind].signals)):
        env = MineMaze(1, kind=kind)
        env.begin()
        env.load_state(env.save_state() | {"signal": torch.tensor([signal])})
        steps = taken(env, route(env, RIGHT if signal == 0 else LEFT))
        assert [step["done"].item() for step in steps] == [False] * (frames - 1) + [True]
        assert steps[-1]["episode_return"].item() == pytest.approx(optimum, abs=1e-4)
        assert steps[-1]["task"].item() == (1 if signal == 0 else -1)


@pytest.mark.parametrize(("kind", "best"), [("LS", 10.2), ("LSO", 8.45), ("LSN", 6.6)])
def test_without_memory_of_the_signal_the_best_return_is_the_published_one(kind, best):
    signals = len(KINDS[kind].signals)
    env = MineMaze(signals, kind=kind)
    env.in_turn = True
    returns = []
    for last in (LEFT, RIGHT):
        env.begin()
        env.load_state(env.save_state() | {"pillars": torch.full((signals,), 0b0110)})
        returns.append(taken(env, route(env, last))[-1]["episode_return"].mean().item())
    assert max(returns) == pytest.approx(best, abs=1e-4)


def test_signals_and_pillars_have_the_published_probabilities():
    for kind, up in (("LS", 0.5), ("LSO", 0.25)):
        env = MineMaze(20_000, kind=kind, rooms=3)
        env.set_seed(0)
        task, state = env.begin()["task"], env.save_state()
        assert (task == 1).float().mean().item() == pytest.approx(up, abs=0.02)
        shares = state["signal"].bincount() / 20_000
        assert shares.tolist() == pytest.approx([1 / len(env.kind.signals)] * len(env.kind.signals), abs=0.02)
        assert (state["pillars"].bincount() / 20_000).tolist() == pytest.approx([1 / 8] * 8, abs=0.02)


def test_a_trial_keeps_the_signal_and_each_episode_draws_its_pillars():
    env = Trials(lambda **o: MineMaze(**o, rooms=16), 2, num_envs=50)
    env.set_seed(0)
    first = env.begin()
    before = env.save_state()["inner"]
    for _ in range(200):
        step = env.advance(torch.full((50,), LEFT))
    after = env.save_state()["inner"]
    assert step["episode_done"].all()
    assert not step["done"].any()
    assert torch.equal(step["observation"], first["observation"])  # the next episode's signal, at once
    assert torch.equal(step["task"], first["task"])
    assert torch.equal(before["signal"], after["signal"])
    assert (before["pillars"] != after["pillars"]).float().mean() > 0.9
    assert env.horizon == 400


def test_an_episode_that_begins_leaves_the_others_alone():
    env = MineMaze(40, kind="LSO")
    env.begin()
    taken(env, [RIGHT, RIGHT, FORWARD])
    rows = torch.arange(40) < 20
    before = env.save_state()
    env.begin(rows)
    after = env.save_state()
    for name in ("signal", "pillars", "place"):
        assert torch.equal(after[name][~rows], before[name][~rows]), name
        assert not torch.equal(after[name][rows], before[name][rows]), name


def test_the_last_frame_pays_nothing_and_moves_nobody():
    env = MineMaze(1)
    env.begin()
    steps = taken(env, [LEFT] * 199)
    assert not steps[-1]["done"]
    assert steps[-1]["reward"] == 0
    (last,) = taken(env, [RIGHT])
    assert (last["terminated"].item(), last["truncated"].item(), last["reward"].item()) == (True, False, 0)
    assert torch.equal(last["observation"], steps[-1]["observation"])


def test_noise_is_added_and_clipped():
    env, plain = MineMaze(2_000, kind="LSN"), MineMaze(2_000, kind="LS")
    env.begin(), plain.begin()
    plain.load_state(plain.save_state() | {"signal": env.save_state()["signal"]})
    noisy = env.advance(torch.full((2_000,), RIGHT))["observation"]
    difference = noisy - plain.advance(torch.full((2_000,), RIGHT))["observation"]
    inner = difference[:, (noisy[0].abs() < 0.7)]
    assert inner.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(inner.mean().item()) < 1e-3
    env.begin()
    assert noisy.abs().max() <= 1
    assert (env.current["observation"] == -1).any()  # where redstone is nearly black


def screenshots(folder, size=10, skip=()):
    """A folder of pictures, each of its own pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(NAMES), size, size, 3), dtype=np.uint8)
    for name, picture in zip(NAMES, pixels, strict=True):
        if name not in skip:
            file = folder / f"{name}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(file)
    return dict(zip(NAMES, pixels, strict=True))


def test_a_folder_s_pictures_are_shown_flipped_and_scaled(tmp_path):
    pictures = screenshots(tmp_path)
    env = MineMaze(1, panels=str(tmp_path))
    env.begin()
    env.load_state(env.save_state() | {"signal": torch.tensor([0]), "pillars": torch.tensor([1])})
    for action, name in ((RIGHT, "room1/0,0"), (FORWARD, "room1/0,1"), (LEFT, "room1/-1,1")):
        (step,) = taken(env, [action])
        assert np.array_equal(shown_pixels(step), pictures[name])
    expected = (pictures["room1/-1,1"][-1, 0].astype(np.float32) - 128) / 128
    assert np.array_equal(step["observation"][0, :3].numpy(), expected)
    assert env.scenery == "folder"


def test_the_published_screenshots_are_known_by_their_pixels(monkeypatch, tmp_path):
    pictures = screenshots(tmp_path)
    digest = hashlib.sha256(np.stack(list(pictures.values())).tobytes()).hexdigest()
    assert not are_published(np.stack(list(pictures.values())))
    monkeypatch.setattr("lightning_hyper.envs.mine_maze_panels.PUBLISHED", {10: digest})
    assert MineMaze(1, panels=str(tmp_path)).scenery == "published"


def test_a_folder_that_cannot_be_used_is_named_with_its_file(tmp_path):
    screenshots(tmp_path, skip=["room1/0,3"])
    with pytest.raises(ValueError, match=rf"data.env.panels: the folder {tmp_path} lacks room1/0,3.png"):
        MineMaze(1, panels=str(tmp_path))
    screenshots(tmp_path)
    with pytest.raises(ValueError, match=r"has a green.png of 10x10 pixels; data.env.size asks for 42x42"):
        MineMaze(1, panels=str(tmp_path), size=42)
    (tmp_path / "room0/1,2.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"has a room0/1,2.png that is no picture"):
        MineMaze(1, panels=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "LSX"}, "MineMaze.kind is 'LSX'; it must be one of LS, LSO, LSN, LSH"),
        ({"rooms": 33}, "MineMaze.rooms is 33; it must be a whole number from 1 to 32"),
        ({"size": 2}, "MineMaze.size is 2; it must be a whole number from 4"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        MineMaze(2, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_goes_on_exactly_where_it_was_saved(kind, continues):
    env, other = (Trials(lambda **o: MineMaze(**o, kind=kind, rooms=1), 2, num_envs=6) for _ in range(2))
    env.begin()
    continues(env, other, torch.randint(3, (120, 6), generator=torch.Generator().manual_seed(0)), 50)


def test_spaces():
    spaces = Spaces.of(Trials(MineMaze, 2, num_envs=2))
    assert (spaces.observation, spaces.actions, spaces.discrete, spaces.task) == ((300,), 3, True, 1)
    assert (spaces.horizon, spaces.trials, spaces.is_image) == (400, True, False)
    image = Spaces.of(MineMaze(2, flat=False, size=42))
    assert (image.observation, image.horizon, image.is_image) == ((42, 42, 3), 200, True)


def test_voxel_panels_have_the_published_geometry():
    panels = dict(zip(NAMES, voxel_panels(100), strict=True))
    # A pillar of one block, 1.5 away, in a view of 70 degrees.
    differs = (panels["room0/0,0"] != panels["room1/0,0"]).any(-1)
    assert differs[50].mean() == pytest.approx(1 / (2 * 1.5 * np.tan(np.radians(35))), abs=0.02)
    # Its foot is one block above the eye's feet, which are 1.62 below the eye.
    foot = differs.any(1).nonzero()[0].max() + 1
    assert foot / 100 == pytest.approx(0.5 + 0.62 / (2 * 1.5 * np.tan(np.radians(35))), abs=0.02)
    # Beside the pillar it is on the other side; behind it, it is not seen.
    for side, half in ((-1, slice(50, None)), (1, slice(0, 50))):
        differs = (panels[f"room0/{side},1"] != panels[f"room1/{side},1"]).any(-1).any(0)
        assert differs[half].any()
        assert differs.sum() == differs[half].sum()
    for cell in ("-1,2", "1,2", "-1,3", "1,3", "0,3"):
        assert np.array_equal(panels[f"room0/{cell}"], panels[f"room1/{cell}"])
    assert panels["green"].mean((0, 1)).argmax() == 1
    assert panels["red"].mean((0, 1)).argmax() == 0


def test_pictures_show_the_panel_and_the_map_where_one_is():
    env = MineMaze(1, kind="LSO", rooms=2)
    env.begin()
    env.load_state(env.save_state() | {"signal": torch.tensor([0])})
    assert env.places().tolist() == [[-2, 0]]
    green = env.render()
    assert (green.shape, green.dtype) == ((260, 240, 3), np.uint8)
    assert green[:240].mean((0, 1)).argmax() == 1
    way = []
    for action in route(env, RIGHT):
        taken(env, [action])
        way.append(tuple(env.places()[0].tolist()))
    assert way[:4] == [(-1, 0), (0, 0), (0, 1), way[3]]
    assert abs(way[3][0]) == 1
    assert way[7:9] == [(0, 4), (0, 5)]
    assert way[-2:] == [(0, 8), (1, 8)]
    for last in (LEFT, RIGHT):
        env.begin()
        taken(env, route(env, last))
        assert env.places().tolist() == [[last - 1, 8]]
    hidden = MineMaze(1, kind="LSH")
    hidden.begin()
    assert hidden.render()[:240].max() == 0


def test_a_film_has_the_colours_of_all_panels(tmp_path):
    env = MineMaze(1, rooms=1)
    env.begin()
    env.load_state(env.save_state() | {"signal": torch.tensor([1]), "pillars": torch.tensor([1])})
    sights = [env.sight()]
    for action in (RIGHT, FORWARD):
        taken(env, [action])
        sights.append(env.sight())
    env.film(sights, tmp_path / "film.gif", 0.1)
    with Image.open(tmp_path / "film.gif") as film:
        for k, sight in enumerate(sights):
            film.seek(k)
            shown = np.asarray(film.convert("RGB")).astype(float)
            assert abs(shown[:240] - sight[:240]).mean() < 4


@pytest.mark.gpu
def test_gpu_mazes_equal_cpu_mazes():
    cpu, gpu = (Trials(lambda **o: MineMaze(**o, rooms=2), 2, num_envs=64, device=d) for d in ("cpu", "cuda"))
    cpu.begin(), gpu.begin()
    state, generator = cpu.save_state(), gpu.inner.save_state()["generator"]
    gpu.load_state({**state, "generator": generator, "inner": {**state["inner"], "generator": generator}})
    for action in torch.randint(3, (199, 64)):
        expected, found = cpu.advance(action), gpu.advance(action.cuda())
        for key, entry in expected.items():
            assert torch.equal(entry, found[key].cpu()), key
        if expected["episode_done"].any():
            break
