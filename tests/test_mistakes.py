"""Every mistake in a recipe or a command is one sentence with its key, before anything is made: by table, by chance.

The search by chance spoils shipped recipes in one place and makes all that a run makes of them, short of training.
`pytest tests/test_mistakes.py --campaign 50` goes on fifty times as long.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import torch

from lightning_hyper import checks, parts, recipes
from lightning_hyper.checks import RecipeError, hints_of
from lightning_hyper.envs import Pendulum
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experiment import Call, Command
from lightning_hyper.layering import DEPTH, Where, merge, read
from lightning_hyper.training.options import OURS

TINY, TINY_TD3, TINY_RETRIEVAL = (Path(__file__).parent / f"tiny{name}.yaml" for name in ("", "_td3", "_retrieval"))
DEEP = "[" * 200 + "]" * 200
EXPLODING = "".join(f"&a{k} [{', '.join([f'*a{k - 1}'] * 10)}], " for k in range(1, 12))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # Options that are the beginnings of others, or misspelt.
        (["--ckpt", "last"], "--ckpt: a recipe has no key 'ckpt'; did you mean --ckpt_path?"),
        (["--frame", "500"], "--frame: a recipe has no key 'frame'; did you mean --frames?"),
        (["--stop", "5"], "did you mean --stop_at_return?"),
        (["--lr", "1e-3"], "--lr: a recipe has no key 'lr'; did you mean --model.lr?"),
        (["--num_envs", "3"], "did you mean --data.env.env.num_envs?"),
        (["--model.lrr", "1e-3"], "model.lrr: PPO takes no such argument; did you mean lr?"),
        (["--data.init_args.seed", "5"], "data.seed: Rollouts takes no such argument; did you mean eval_seed?"),
        (
            ["--checkpoint.moniter", "x"],
            "checkpoint.moniter: Checkpoints takes no such argument; did you mean monitor?",
        ),
        (["--trainer.device", "1"], "trainer.device: Trainer takes no such argument; did you mean devices?"),
        (["--" + ".".join(["model"] * 1000), "1"], "a key has at most"),
        # Metrics that nothing measures.
        (["--checkpoint.monitor", "eval/retrun"], "checkpoint.monitor is 'eval/retrun'; did you mean eval/return?"),
        (
            ["--checkpoint.monitor", "eval/episode_3"],
            "checkpoint.monitor is 'eval/episode_3'; did you mean eval/episode_",
        ),
        (
            ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: eval/retrun}}]"],
            "trainer.callbacks EarlyStopping.monitor is 'eval/retrun'; did you mean eval/return?",
        ),
        # Numbers.
        (["--model.loss.value", "-1000"], "model.loss.value is -1000; it must be a number from 0 to"),
        (["--model.lr", "null"], "model.lr is null; it must be a number above 0"),
        (["--model.lr", "nan"], "model.lr is 'nan'; it must be a number"),
        (["--model.lr", ".nan"], "model.lr is nan; it must be a number"),
        (["--model.lr", ".inf"], "model.lr is inf; it must be a number"),
        (["--model.lr", "true"], "model.lr is true; it must be a number"),
        (["--model.gamma", "0"], "model.gamma is 0; it must be a number above 0 and up to 1"),
        (["--model.context.encoder.hidden", "null"], "model.context.encoder.hidden is null; it must be a whole number"),
        (["--model.actor.hidden", "null"], "model.actor.hidden is null; it must be a list"),
        (
            ["--model.actor.hidden", "[0, 256]"],
            "model.actor.hidden is [0, 256]; it must be a list, each a whole number",
        ),
        (["--model.critic.hidden", "[1000000000]"], "model.critic.hidden is [1000000000]; it must be a list"),
        (
            [
                "--model.actor",
                "{class_path: Hyper, init_args: {hidden: [1, 16000, 16000], trunk: {class_path:"
                " MLPTrunk, init_args: {widths: [4096]}}}}",
            ],
            "model.actor: what its sizes ask for does not fit in memory",
        ),
        (["--frames", "1e4"], "frames is 10000.0; it must be a whole number from 1 to 1,000,000,000,000: write 10000"),
        (["--threads", "0"], "threads is 0; it must be a whole number from 1"),
        (["--seed", "-1"], "seed is -1; it must be a whole number from 0"),
        (["--stop_at_return", ".nan"], "stop_at_return is nan; it must be a number"),
        # Texts.
        (["--experiment="], "experiment is ''; it must be a name for a folder"),
        (["--run", "../x"], "run is '../x'; it must be a name for a folder"),
        (["--experiment", ".."], "experiment is '..'; it must be a name for a folder"),
        (["--root="], "root is ''; it must be a path"),
        (["--model.actor.activation", "swish"], "model.actor.activation is 'swish'; it must be one of tanh, relu"),
        # Classes.
        (
            ["--trainer.callbacks", "[{}]"],
            "trainer.callbacks.0.class_path is null; it must name a class, a kind of Callback",
        ),
        (["--trainer.callbacks+=PPO"], "trainer.callbacks.0: PPO is no Callback; take one such as"),
        (
            ["--model.actor", "{class_path: Hyper, int_args: {}}"],
            "model.actor.int_args: no such key; did you mean init_args?",
        ),
        (
            ["--model.actor", "{class_path: Hyper, hidden: [3]}"],
            "model.actor.hidden: no such key; a class has class_path",
        ),
        (["--model.actor", "EpisodicMemory"], "model.actor: EpisodicMemory is no Module; take one such as"),
        (["--model.actor", "GRU"], "model.actor: GRU cannot be made from what it gets there; take one such as"),
        (["--model.encoder", "GRU"], "model.encoder: GRU cannot be made from what it gets there; take one such as"),
        (
            ["--model.context", "ContextSource"],
            "model.context: ContextSource is what several classes share; take one such as",
        ),
        (
            ["--model.actor", "lightning_hyper.nn.Hypr"],
            "model.actor: there is no class 'lightning_hyper.nn.Hypr'; did you mean Hyper?",
        ),
        (
            ["--model.actor", "no.such.module.Thing"],
            "model.actor: there is no class 'no.such.module.Thing'; take one such as",
        ),
        (["--model", "/etc/hostname"], "model: there is no class '/etc/hostname'"),
        (["--data", "Trials"], "data: Trials is no Experience; take one such as Replay, Rollouts"),
        (["--model.actor.init_args", "5"], "model.actor is 5; it must be a mapping of the arguments of Hyper"),
        (["--trainer", "5"], "trainer is 5; it must be a mapping of the arguments of Trainer"),
        (["--checkpoint", "null"], "checkpoint is null; it must be a mapping of the arguments of Checkpoints"),
        # The trainer.
        (["--trainer.accelerator", "gpu"], "trainer.accelerator is 'gpu': No supported gpu backend found"),
        (["--trainer.devices", "0"], "trainer.devices is 0: "),
        (["--trainer.max_time", "abc"], "trainer.max_time is 'abc': "),
        (["--trainer.strategy", "none"], "trainer.strategy is 'none': "),
        (["--trainer.profiler", "none"], "trainer.profiler is 'none': "),
        (["--trainer.precision", "64"], "trainer.precision is 64; choose '32-true' or 'bf16-mixed'"),
        # YAML.
        (
            ["--model.actor", DEEP],
            f"is no YAML: it is nested more than {DEPTH} deep",
        ),
        (["--model.actor", f"[&a0 x, {EXPLODING}]"], "with its aliases it stands for "),
        (["--model.actor", "&a [*a]"], "an alias stands for what it is a part of"),
        (["--ckpt_path", "a.ckpt"], "ckpt_path: there is no file a.ckpt"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tiny, capfd, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiny("fit", *arguments) == 2
    refused(capfd, said)


@pytest.mark.parametrize(
    ("arguments", "said", "recipe"),
    [
        (["--model.tau", "0"], "model.tau is 0; it must be a number above 0 and up to 1", TINY_TD3),
        (["--model.policy_delay", "1000000000000"], "model.policy_delay is 1000000000000; it must be", TINY_TD3),
        (["--model.critic.trunk.blocks", "-1"], "model.critic.trunk.blocks is -1; it must be", TINY_TD3),
        (
            ["--model.critic_context", "[SA]"],
            "model.critic_context is ['SA']; it must be a list, each one of",
            TINY_TD3,
        ),
        (
            ["--data.env.num_envs", "1000000"],
            "data.env.num_envs is 1000000; it must be a whole number from 1",
            TINY_TD3,
        ),
        (["--data.steps", "1000000", "--data.env.num_envs", "4096"], "data.capacity is 150, less than", TINY_TD3),
        (["--data.eval_envs", "1"], "data.eval_envs is 1, but data.env.tasks lists 3", TINY_RETRIEVAL),
        (["--model.memory", "null"], "model.memory is null; it must name a class", TINY_RETRIEVAL),
        (["--model.retriever.heads", "5"], "model.retriever.heads is 5; it must divide", TINY_RETRIEVAL),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistakes_in_other_recipes(tiny, capfd, arguments, said, recipe):
    assert tiny("fit", *arguments, recipe=recipe) == 2
    refused(capfd, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.capacity", "1000000"], "data.capacity asks for 0 GiB of memory"),
        (["--data.capacity", "100000", "--data.steps", "50000"], "data.env.num_envs times data.steps asks for"),
    ],
)
def test_sizes_that_the_machine_does_not_have_are_refused_before_they_are_taken(
    tiny, capfd, monkeypatch, arguments, said
):
    monkeypatch.setattr(checks, "memory", lambda: 2**20)
    assert tiny("fit", *arguments, recipe=TINY_TD3) == 2
    refused(capfd, said)


@pytest.mark.parametrize("key", OURS)
def test_what_the_package_decides_is_no_option_of_the_trainer(tiny, capfd, key):
    assert key in hints_of(parts.GROUPS["trainer"].__init__)
    hint = str(hints_of(parts.GROUPS["trainer"].__init__)[key])
    value = "7" if "int" in hint else "x" if "str" in hint else "false" if key == "enable_checkpointing" else "true"
    value = "false" if key == "use_distributed_sampler" else value
    assert tiny("fit", f"--trainer.{key}", value) == 2
    refused(capfd, f"trainer.{key} is ")


def refused(capfd: pytest.CaptureFixture[str], said: str) -> None:
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("lightning-hyper fit: error: "), lines
    assert said in lines[0]
    assert len(lines[0]) < 500
    assert not list(Path("runs").rglob("*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, f"nested more than {DEPTH} deep"),
        (f"a: [&a0 x, {EXPLODING}]", "with its aliases it stands for"),
        ("a: &a\n  b: *a", "an alias stands for what it is a part of"),
    ],
)
def test_a_file_that_would_not_end_is_refused_at_once(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(RecipeError, match=said):
        recipes.resolve([str(tmp_path / "recipe.yaml")])
    assert time.monotonic() - start < 5


def test_aliases_that_stand_for_little_are_read():
    assert read("a: &a [1, 2]\nb: {c: *a, d: *a}") == {"a": [1, 2], "b": {"c": [1, 2], "d": [1, 2]}}


def test_names_of_sweeps_fit_a_file_system_and_stay_apart():
    long = ",".join(f"MiniGrid-Empty-{k}x{k}-v0" for k in range(12))
    names = {recipes.short(f"retrieval-tasks={long}{end}") for end in "ab"}
    assert len(names) == 2
    assert all(len(name) <= recipes.LONGEST for name in names)
    assert recipes.short("short") == "short"


def test_every_number_of_every_class_has_a_range():
    """Nothing that a recipe makes takes any number at all."""
    bare = []
    for cls in map(_imported, parts.NAMES.values()):
        init = vars(cls).get("__init__")
        if init is None or cls.__module__.startswith("lightning_hyper.analysis") or is_dataclass(cls):
            continue
        options = inspect.signature(init).parameters.values()
        hints = {each.name: hints_of(init).get(each.name) for each in options if each.default is not each.empty}
        bare += [f"{cls.__name__}.{name}: {hint}" for name, hint in hints.items() if _is_bare(hint)]
        if any("Annotated" in str(hint) for hint in hints.values()) and not hasattr(init, "__wrapped__"):
            bare.append(f"{cls.__name__} is not checked")
    assert not bare


def _is_bare(hint) -> bool:
    if get_origin(hint) in (Annotated, Callable):
        return False
    return hint in (int, float) or any(map(_is_bare, get_args(hint)))


def _imported(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


class NotANumber(Pendulum):
    """A pendulum that pays nothing that is a number, in float64."""

    def simulate(self, action):
        observation, reward, terminated = super().simulate(action)
        return observation.double(), reward.double() * float("nan"), terminated


class Float64(Pendulum):
    def observation(self):
        return super().observation().double()

    def simulate(self, action):
        observation, reward, terminated = super().simulate(action)
        return observation.double(), reward.double(), terminated


PENDULUM = f"{{class_path: {__name__}.%s, init_args: {{num_envs: 2, episode_steps: 30}}}}"


@pytest.mark.parametrize("recipe", [TINY_TD3, TINY])
def test_a_reward_that_is_no_number_is_blamed_on_the_environment(tiny, capfd, recipe):
    words = ["--data.env", PENDULUM % "NotANumber"]
    if recipe == TINY:
        words += [
            "--model.context",
            "null",
            "--model.actor",
            "MLP",
            "--model.critic",
            "MLP",
            "--model.minibatches",
            "2",
        ]
        words += ["--model.partition", "steps"]
    assert tiny("fit", *words, recipe=recipe) == 1
    assert "error: data.env: reward is nan in what was collected up to frame" in capfd.readouterr().err


def test_an_environment_may_give_doubles(tiny):
    assert tiny("fit", "--data.env", PENDULUM % "Float64", "--frames", "80", recipe=TINY_TD3) == 0


# The search by chance.

FOUND = {
    "recurrent": ["recurrent/gridnavi_rnn_hn"],
    "retrieval": ["retrieval/retrieval+retrieval/three"],
    "building blocks": ["building_blocks/inverted_double_pendulum_sac_sa_hyper_compact"],
    "prioritised": ["building_blocks/pendulum+building_blocks/td3+building_blocks/variants/prioritized"],
    "gymnasium": ["gymnasium/cartpole"],
    "recurrent gymnasium": ["gymnasium/ppo+gymnasium/recurrent"],
}
VALUES = (None, 0, -1, -0.5, 0.5, 10**9, 10**12, 1e300, float("nan"), float("inf"), True, "", "many", "/etc/hostname",
          "..", [], {}, [None], [[1]], [0], {"a": 1}, {"class_path": None}, {"class_path": 5}, {"init_args": {}},
          {"class_path": "PPO", "init_args": 5})  # fmt: skip
SIZES = {"num_envs": 4, "eval_envs": 4, "hidden": [4], "widths": [4], "capacity": 400, "batch_size": 4, "levels": 2}


def places(tree, path=()):
    """The path of every value."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            yield from places(value, (*path, key))


def parent(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def spoil(recipe, draw: random.Random):
    """A recipe with one mistake, or what may be one, and its path."""
    recipe = copy.deepcopy(recipe)
    path = draw.choice(list(places(recipe)))
    holder, key = parent(recipe, path), path[-1]
    kind = draw.choice(["value", "value", "drop", "rename", "class", "swap", "add", "wrap", "retype"])
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(key, str) and isinstance(holder, dict):
        cut = draw.randrange(len(key))
        path = (*path[:-1], key[:cut] + key[cut + 1 :])
        holder[path[-1]] = holder.pop(key)
    elif kind == "class":
        holder[key] = draw.choice(list(parts.NAMES))
    elif kind == "swap":
        other = draw.choice(list(places(recipe)))
        holder[key] = copy.deepcopy(parent(recipe, other)[other[-1]])
    elif kind == "add" and isinstance(holder, dict):
        path = (
            *path[:-1],
            draw.choice(["seed", "device", "x", "hidden", "class_pat", "init_args", "lr", "dict_kwargs"]),
        )
        holder[path[-1]] = draw.choice(VALUES)
    elif kind == "wrap":
        holder[key] = draw.choice([[holder[key]], {"a": holder[key]}, [holder[key]] * 30])
    elif kind == "retype":
        holder[key] = str(holder[key])
    else:
        holder[key] = draw.choice(VALUES)
    return recipe, path


def small(tree):
    """A recipe with sizes as small as they go."""
    if isinstance(tree, list):
        return [small(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: 4 if key == "hidden" and isinstance(value, int) else SIZES.get(key, small(value))
        for key, value in tree.items()
    }


def make(recipe) -> None:
    """All that a run makes before it trains."""
    command = Command(Call("fit", ["search"]), recipe)
    data, model = command.datamodule, command.model
    data.trainer = command.trainer
    data.connect()
    model.build(Spaces.of(data.env))
    model.check(data.env.batch_size.numel(), data.steps)
    data.begin(model.policy, folder=command.folder.path, budget=command.settings.frames)


@pytest.fixture
def quiet_machine(monkeypatch, tmp_path):
    """What making many runs in one process changes is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def whole(names):
    recipe = small(recipes.resolve(names))
    more = {"matmul": "default", "trainer": {"accelerator": "cpu"}}
    if "minibatches" in recipe["model"]["init_args"]:
        recipe["model"]["init_args"]["minibatches"] = 2
    if recipe["data"]["class_path"] == "Replay":
        recipe["data"]["init_args"]["warmup_frames"] = 20
    return merge(recipe, more, Where("test"))


@pytest.mark.parametrize("names", FOUND.values(), ids=FOUND)
def test_a_spoilt_recipe_is_made_or_refused_in_one_sentence(names, campaign, quiet_machine):
    draw, counts, faults = random.Random(" ".join(names)), {"made": 0, "refused": 0}, []
    recipe = whole(names)
    make(recipe)
    before = signal.signal(signal.SIGALRM, _give_up)
    try:
        for k in range(40 * campaign):
            spoilt, path = spoil(recipe, draw)
            signal.alarm(30)
            try:
                make(spoilt)
                counts["made"] += 1
            except RecipeError as error:
                counts["refused"] += 1
                if not _is_plain(str(error), path):
                    faults.append(f"{k}: {path} {_at(spoilt, path)!r:.80}: {error}")
            except Exception as error:
                faults.append(f"{k}: {path} {_at(spoilt, path)!r:.80}: {type(error).__name__}: {error!s:.200}")
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    print(f"{'+'.join(names)}: {counts['made']} made, {counts['refused']} refused")
    assert not faults, "\n".join(faults)
    assert counts["made"] >= 3
    assert counts["refused"] >= 20


def _give_up(number, frame):
    raise TimeoutError("it goes on and on")


def _is_plain(said, path):
    """Whether a refusal is one short line with a key of what was spoilt."""
    keys = [str(key) for key in path if key not in ("init_args", "dict_kwargs")] or path
    return "\n" not in said and len(said) < 400 and any(re.search(rf"\b{re.escape(key)}\b", said) for key in keys[-2:])


def _at(tree, path):
    holder = parent(tree, path)
    try:
        return holder[path[-1]]
    except (KeyError, IndexError):
        return "gone"
