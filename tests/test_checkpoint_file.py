"""A damaged or foreign checkpoint ends in one sentence that names the file or the entry, and in nothing else."""

import copy
import io
import random
import zipfile
from functools import partial

import pytest
import torch

import lightning_hyper
from lightning_hyper.algorithms import PPO, TD3, RetrievalPPO
from lightning_hyper.checkpoint_file import CheckpointError, read_checkpoint
from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Pendulum, Trials
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Replay, Rollouts
from lightning_hyper.memory import EpisodicMemory
from lightning_hyper.modules import OneHotContext, RecurrentContext
from lightning_hyper.modules.retriever import AttentionRetriever
from lightning_hyper.nn import GRU, MLP, Concat, GridEncoder, Hyper
from lightning_hyper.parts import instantiate_model

RECIPE = {
    "method": "small",
    "frames": 100,
    "data": {"class_path": "Rollouts", "init_args": {"env": {"class_path": "Gym", "init_args": {"id": "CartPole-v1"}}}},
    "model": {
        "class_path": "PPO",
        "init_args": {
            "context": {"class_path": "RecurrentContext"},
            "actor": {"class_path": "Concat", "init_args": {"hidden": [8]}},
            "critic": {"class_path": "Concat", "init_args": {"hidden": [8]}},
            "normalize_observation": True,
        },
    },
}


@pytest.fixture(scope="module")
def whole():
    """The entries of a checkpoint."""
    env = Gym("CartPole-v1", 2)
    model = instantiate_model(RECIPE["model"])
    model.build(Spaces.of(env))
    rank = {"generators": {"torch": torch.get_rng_state()}, "experience": env.save_state(), "algorithm": {}}
    return {
        "recipe": RECIPE,
        "spaces": model.spaces.asdict(),
        "state_dict": model.state_dict(),
        "frames": 64,
        "run_id": "0123",
        "ranks": [rank],
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


def changed(whole, keys, value):
    """A copy with another value in one place, or without it where the value is `...`."""
    there = copy.deepcopy(whole)
    place = there
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return there


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def refused(path, match="", **options):
    """One sentence that names the file."""
    with pytest.raises(CheckpointError, match=match) as caught:
        lightning_hyper.load(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_is_read_as_it_was_written(whole, path):
    torch.save(whole, path)
    assert same(read_checkpoint(path), whole)
    assert lightning_hyper.load(path).act([0.0, 0.0, 0.0, 0.0]) in (0, 1)


FILES = {
    "nothing": b"",
    "text": b"frames: 3\n",
    "zeros": bytes(5000),
    "pickle": b"\x80\x04K\x03.",
    "end of a zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("contents", FILES.values(), ids=FILES)
def test_another_file_is_no_checkpoint(path, contents):
    path.write_bytes(contents)
    refused(path, "is truncated or no checkpoint|not written by lightning-hyper")


def test_a_missing_file_and_a_folder_are_told_apart(path):
    refused(path, r"there is no file .*last\.ckpt$")
    path.mkdir()
    refused(path, "but a folder")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_truncated(whole, path, share):
    torch.save(whole, path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    refused(path, "is truncated")


def test_a_single_flipped_bit_in_a_tensor_is_found_by_its_checksum(whole, path):
    torch.save(whole, path)
    contents = bytearray(path.read_bytes())
    weight = next(tensor for tensor in whole["state_dict"].values() if tensor.dtype == torch.float32)
    contents[contents.index(weight.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(contents)
    refused(path, r"bytes of its entry .*data/\d+ have changed")


def test_a_compressed_file_is_refused_before_it_is_unpacked(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(10**7))
    refused(path, "it is compressed")


def damaged_bytes(contents, draw):
    there = bytearray(contents)
    kind = draw.choice(["flip", "flip", "zero", "cut", "insert", "swap", "repeat"])
    at, length = draw.randrange(len(there)), draw.choice([1, 3, 50, 2000])
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 4])):
            there[draw.randrange(len(there))] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        there[at : at + length] = bytes(len(there[at : at + length]))
    elif kind == "cut":
        del there[at : at + length]
    elif kind == "insert":
        there[at:at] = draw.randbytes(length)
    elif kind == "swap":
        there[at : at + length] = draw.randbytes(len(there[at : at + length]))
    else:
        there[at:at] = there[:at]
    return bytes(there)


def test_damaged_bytes_never_change_what_is_read(whole, path, campaign):
    draw = random.Random(0)
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    said, read = [], []
    for _ in range(300 * campaign):
        path.write_bytes(damaged_bytes(buffer.getvalue(), draw))
        try:
            read.append(read_checkpoint(path))
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 200 * campaign
    assert all(str(path) in each and "\n" not in each for each in said)
    assert read  # there are bytes of no meaning
    assert all(same(each, whole) for each in read)


WIDTHS = ["recipe", "model", "init_args", "actor", "init_args", "hidden"]
BIAS = ["state_dict", "agent.actor.layers.0.bias"]
RAW = ["spaces", "raw", "observation"]
CONTEXT = ["recipe", "model", "init_args", "context"]
ENTRIES = {
    "no recipe": (["recipe"], ..., "not written by lightning-hyper"),
    "recipe": (["recipe"], [1], r"its entry recipe is of type list"),
    "recipe's model": (["recipe", "model"], "PPO", r"recipe.model is 'PPO'"),
    "recipe's tensor": (
        ["recipe", "model", "init_args", "lr"],
        torch.ones(2),
        r"recipe.model.init_args.lr is a tensor of",
    ),
    "spaces": (["spaces"], "box", r"its entry spaces is 'box'"),
    "space": (["spaces", "observation"], "four", r"spaces.observation is 'four'"),
    "missing space": (["spaces", "actions"], ..., r"spaces.actions is missing"),
    "another space": (["spaces", "sizes"], 3, r"spaces.sizes is 3"),
    "absurd space": (["spaces", "observation"], (10**9,), r"spaces.observation"),
    "absurd image": (["spaces", "observation"], (10**4, 10**4, 10**4), r"spaces.observation"),
    "absurd actions": (["spaces", "actions"], 10**12, r"spaces.actions is 1000000000000"),
    "absurd raw space": (
        ["spaces", "raw", "observation", "shape"],
        [10**9],
        r"spaces.raw describes no space \(has shape",
    ),
    "raw space": (RAW, {"kind": "Discrete", "n": 4, "start": 0}, None),
    "other raw space": (RAW, {"kind": "Discrete", "n": 5, "start": 0}, r"spaces.raw describes other"),
    "raw objects": (["spaces", "raw", "observation", "dtype"], "O", r"spaces.raw"),
    "frames": (["frames"], "many", r"its entry frames is 'many'"),
    "negative frames": (["frames"], -1, r"frames is -1"),
    "half frames": (["frames"], 0.5, r"frames is 0.5"),
    "huge frames": (["frames"], 10**400, r"frames is of type int"),
    "run": (["run_id"], 3, r"run_id is 3"),
    "ranks": (["ranks"], {}, r"ranks is of type dict"),
    "rank": (["ranks", 0], 3, r"ranks.0 is 3"),
    "experience": (["ranks", 0, "experience"], [], r"ranks.0.experience is of type list"),
    "weights": (["state_dict"], [], r"state_dict is of type list"),
    "weight": (["state_dict", "agent.actor.layers.0.weight"], 3, r"state_dict.agent.actor.layers.0.weight is 3"),
    "no weights": (["state_dict"], {}, r"state_dict"),
    "missing weight": (["state_dict", "agent.actor.layers.0.weight"], ..., r"agent.actor.layers.0.weight is missing"),
    "more weights": (["state_dict", "more"], torch.ones(1), r"state_dict.more is no part of the model"),
    "other shape": (BIAS, torch.ones(9), r"layers.0.bias is a tensor of \(9,\)"),
    "NaN": (BIAS, torch.full((8,), torch.nan), r"layers.0.bias is NaN or infinite"),
    "infinite": (BIAS, torch.full((8,), torch.inf), r"bias is NaN or infinite"),
    "claimed": (BIAS, torch.ones(1).expand(10**15), r"of which the file holds only"),
    "claimed elsewhere": (
        ["ranks", 0, "algorithm", "x"],
        torch.ones(1).expand(10**12),
        r"ranks.0.algorithm.x is a tensor",
    ),
    "sparse": (["state_dict", "more"], torch.eye(2).to_sparse(), r"state_dict.more is a tensor of a kind|sparse"),
    "without memory": (["state_dict", "more"], torch.empty(3, device="meta"), r"state_dict.more is a tensor of a kind"),
    "wide network": (WIDTHS, [16_384, 16_384], r"recipe.model describes a larger model than"),
    "endless network": (WIDTHS, [10**9], r"hidden is \[1000000000\]"),
    "long network": (WIDTHS, [2] * 200, r"describes a larger model"),
    "wider network": (WIDTHS, [9], r"state_dict.agent.actor"),
    "longer network": (WIDTHS, [2] * 10**5, r"recipe.* is too long"),
    "exploding text": (
        ["recipe", "model", "init_args", "actor"],
        "[&a [x, x], &b [*a, *a]]",
        r"a text that may explode",
    ),
    "deep text": (["recipe", "model", "init_args", "actor"], "[" * 5000, r"recipe"),
    "wide code": ([*CONTEXT, "init_args"], {"code": 10**12}, r"recipe"),
    "unknown option": (["recipe", "model", "init_args", "depth"], 3, r"model.depth"),
    "wrong option": (["recipe", "model", "init_args", "lr"], "fast", r"lr"),
}


@pytest.mark.parametrize(("keys", "value", "match"), ENTRIES.values(), ids=ENTRIES)
def test_an_entry_of_another_kind_is_named(whole, path, keys, value, match):
    torch.save(changed(whole, keys, value), path)
    if match is None:
        assert lightning_hyper.load(path).act(2) in (0, 1)
    else:
        refused(path, match)


def test_what_refers_to_itself_or_explodes_is_refused(whole, path):
    endless, bomb = [], [1]
    endless.append(endless)
    for _ in range(40):
        bomb = [bomb] * 10
    for value, match in ((endless, "is nested too deeply"), (bomb, "is too long")):
        torch.save({**whole, "more": value}, path)
        refused(path, match)
    torch.save({**whole, "recipe": {"model": [[0] * 1000] * 1000}}, path)
    refused(path, "recipe.*is of type list|is too long")


VALUES = (
    *(None, True, -1, 0, 10**12, 10**400, 0.5, float("nan"), "", "PPO", "a: {b: c}", b"bytes", [], {}, (), [None]),
    *({"class_path": "PPO"}, torch.ones(3), torch.zeros(0), torch.full((8,), torch.nan), torch.ones(2, 2).long()),
)


def places(tree, keys=()):
    """Keys that lead to each place that can be changed."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*keys, key)
        if isinstance(value, dict | list):
            yield from places(value, (*keys, key))


def test_another_value_in_any_entry_is_refused_or_serves(whole, path, campaign):
    draw = random.Random(0)
    there = list(places(whole))
    said, actions = [], []
    for _ in range(100 * campaign):
        torch.save(changed(whole, draw.choice(there), draw.choice([..., *VALUES])), path)
        try:
            actions.append(lightning_hyper.load(path).act([0.0, 0.0, 0.0, 0.0]))
        except CheckpointError as error:
            said.append(str(error))
    assert all(str(path) in each and "\n" not in each for each in said)
    assert {*actions} <= {0, 1}
    assert min(len(said), len(actions)) > 10 * campaign


# What a resumed run takes over.

SMALL = {"actor": partial(Concat, hidden=[4]), "critic": partial(Concat, hidden=[4])}


def trials():
    env = partial(Trials, partial(GridNavi, episode_steps=3), num_envs=3)
    model = PPO(context=partial(RecurrentContext, encoder=partial(GRU, hidden=3)), normalize_reward=True, **SMALL)
    return model, Rollouts(env, steps=4)


def gymnasium():
    return PPO(normalize_reward=True, **SMALL), Rollouts(partial(Gym, "CartPole-v1", num_envs=2), steps=4)


def replay():
    env = partial(Pendulum, num_envs=2, episode_steps=5)
    sizes = {"capacity": 40, "batch_size": 4, "warmup_frames": 4, "steps": 4}
    return TD3(**SMALL), Replay(env, prioritized=[0.6, 0.4], **sizes)


def retrieval():
    env = partial(MiniGrid, num_envs=2, tasks=["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0"], levels=2)
    model = RetrievalPPO(
        memory=EpisodicMemory(capacity=6),
        retriever=partial(AttentionRetriever, subset=None, refresh=2),
        encoder=partial(GridEncoder, channels=(2, 2, 3)),
        context=partial(OneHotContext, outputs=3, role=True),
        decision=partial(Hyper, hidden=[]),
        actor=partial(MLP, hidden=[4]),
        critic=partial(MLP, hidden=[4]),
    )
    return model, Rollouts(env, steps=60)


RUNS = {run.__name__: run for run in (trials, gymnasium, replay, retrieval)}


def begun(run):
    model, data = RUNS[run]()
    data.connect(seed=1)
    model.build(Spaces.of(data.env))
    data.begin(model.policy)
    return model, data


@pytest.fixture(scope="module")
def states():
    """What a rank of each run has in its checkpoint."""
    found = {}
    for run in RUNS:
        model, data = begun(run)
        for _ in range(3):
            model.learn(data.collect())
        found[run] = {"experience": data.save_state(), "algorithm": model.save_state()}
    return found


def taken_over(run, state):
    model, data = begun(run)
    data.load_state(copy.deepcopy(state.get("experience", {})))
    model.load_state(copy.deepcopy(state.get("algorithm", {})))
    return model, data


RESUMED = {
    "generator": ("trials", ["experience", "env", "generator"], torch.zeros(3, dtype=torch.uint8)),
    "generator's contents": ("trials", ["experience", "env", "generator"], torch.zeros(5056, dtype=torch.int64)),
    "observation": ("trials", ["experience", "env", "current", "observation"], torch.zeros(3, 5)),
    "missing": ("trials", ["experience", "env", "current", "reward"], torch.zeros(3, 1)),
    "inner": ("trials", ["experience", "env", "inner", "goal"], ...),
    "environments": ("trials", ["experience", "env", "episode"], torch.zeros(4, 1, dtype=torch.int64)),
    "policy's memory": ("trials", ["experience", "state", "policy"], torch.zeros(4, 3)),
    "NaN in the policy's memory": ("trials", ["experience", "state", "policy"], torch.full((3, 3), torch.nan)),
    "running return": ("trials", ["algorithm", "return_scale", "running"], torch.zeros(3)),
    "return scale": ("trials", ["algorithm", "return_scale"], 3),
    "of gymnasium": ("gymnasium", ["experience", "env", "envs", 0], 3),
    "in gymnasium": ("gymnasium", ["experience", "env", "envs", 0, 0], {"x": {"kind": "evil"}}),
    "updates": ("replay", ["algorithm", "updates"], 0.5),
    "replay's frames": ("replay", ["experience", "frames"], None),
    "entries": ("retrieval", ["algorithm", "memory", "entries", "value"], torch.zeros(5)),
    "entry": (
        "retrieval",
        ["algorithm", "memory", "entries", "observation"],
        torch.zeros(6, 7, 7, 4, dtype=torch.uint8),
    ),
    "NaN entry": ("retrieval", ["algorithm", "memory", "entries", "value"], torch.full((6,), torch.nan)),
    "unknown task": ("retrieval", ["algorithm", "memory", "entries", "task"], torch.full((6,), 2)),
    "another entry": ("retrieval", ["algorithm", "memory", "entries", "hint"], torch.zeros(6)),
    "no entries": ("retrieval", ["algorithm", "memory", "entries"], {}),
    "stamps": ("retrieval", ["algorithm", "memory", "stamps"], torch.full((6,), -1)),
    "lengths": ("retrieval", ["algorithm", "recorder", "lengths"], torch.full((2,), 10**6)),
    "pending": ("retrieval", ["algorithm", "recorder", "pending", "task"], ...),
    "keys": ("retrieval", ["algorithm", "keys", "keys"], torch.zeros(6, 9)),
}


@pytest.mark.parametrize(("run", "keys", "value"), RESUMED.values(), ids=RESUMED)
def test_a_state_of_another_shape_or_type_is_named(states, run, keys, value):
    with pytest.raises(CheckpointError, match=f"ranks.0.{keys[0]}") as caught:
        taken_over(run, changed(states[run], keys, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", RUNS)
def test_a_state_that_is_whole_is_taken_over(states, run):
    model, data = taken_over(run, states[run])
    assert same(data.save_state(), states[run]["experience"])
    assert same(model.save_state(), states[run]["algorithm"])


@pytest.mark.parametrize("run", RUNS)
def test_a_state_of_another_run_is_refused(states, run):
    for other in RUNS:
        if other != run:
            with pytest.raises(CheckpointError, match=r"ranks.0.experience"):
                taken_over(run, states[other])


@pytest.mark.parametrize("run", RUNS)
def test_another_value_in_any_state_is_refused_or_serves(states, run, campaign):
    draw = random.Random(0)
    there = list(places(states[run]))
    said = []
    for _ in range(15 * campaign):
        keys, value = draw.choice(there), draw.choice([..., *VALUES])
        try:
            _, data = taken_over(run, changed(states[run], keys, value))
            if run != "gymnasium":  # what its attributes mean, and which sizes they have, is known to an environment
                data.collect()
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 5 * campaign
    assert all("ranks.0" in each and "\n" not in each for each in said)


REPLAYS = {
    "cursor": (["cursor"], 3, r"its frames are \d+ up to row 3, not those of frame"),
    "cursor's type": (["cursor"], "3", r"cursor is '3'"),
    "newest": (["newest", "observation"], torch.zeros(1, 3), r"newest.observation"),
    "first end": (["ends", "first"], 10**6, r"its ends are not the ends of its episodes"),
    "ends": (["ends", "rows", "observation"], torch.zeros(1, 9), r"ends.rows.observation"),
    "reward": (["frames", "reward"], torch.zeros(3), r"frames are \d+ up to"),
    "pickle": (["frames"], 3, r"its frames are of another task"),
    "priorities": (["priorities"], torch.full((24,), -1.0, dtype=torch.float64), r"priorities are not positive"),
    "NaN priorities": (["priorities"], torch.full((24,), torch.nan, dtype=torch.float64), r"priorities is NaN"),
    "largest": (["largest"], None, r"largest is None"),
    "capacity": (["capacity"], None, r"capacity None is not 40"),
}


@pytest.mark.parametrize(("keys", "value", "match"), REPLAYS.values(), ids=REPLAYS)
def test_a_replay_buffer_of_another_kind_or_frame_is_named(tmp_path, keys, value, match):
    _, data = begun("replay")
    for _ in range(3):
        data.collect()
    data.save_buffer(tmp_path)
    file = tmp_path / "frames.pt"
    torch.save(changed(torch.load(file, weights_only=True), keys, value), file)
    _, other = begun("replay")
    other.load_state(data.save_state())
    with pytest.raises(CheckpointError, match=rf"frames\.pt .*{match}"):
        other.load_buffer(tmp_path)


def test_a_replay_buffer_of_another_frame_is_refused(tmp_path):
    _, data = begun("replay")
    for _ in range(2):
        data.collect()
    data.save_buffer(tmp_path)
    data.collect()
    _, other = begun("replay")
    other.load_state(data.save_state())
    with pytest.raises(CheckpointError, match=r"its frames are 16 up to row 16, not those of frame 24"):
        other.load_buffer(tmp_path)
