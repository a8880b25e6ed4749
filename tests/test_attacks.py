"""What a hostile checkpoint tries: nothing that it names is imported, run, read or written."""

import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

import lightning_hyper
from lightning_hyper.algorithms import PPO
from lightning_hyper.checkpoint_file import CheckpointError
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import Pendulum
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.foreign import KINDS, ROOMS, limited, own_parts
from lightning_hyper.nn import Concat
from lightning_hyper.parts import refuse_foreign

EVIL = """
from pathlib import Path
Path("touched").touch()
from torch.nn import Linear, Module
import os
class Net(Module):
    def __init__(self, *sizes): Path("touched").touch()
class Outer(Linear):
    class Inner(Module): pass
def make(*sizes): Path("touched").touch()
"""


class BystanderNet(nn.Module):
    """A class of the caller's, in memory already, which a short name would find."""

    def __init__(self, *sizes: int) -> None:
        Path("touched").touch()


class BystanderEnv(gymnasium.Env):
    """An environment of the caller's, which has been registered."""

    def __init__(self) -> None:
        Path("touched").touch()


if "Bystander-v0" not in gymnasium.registry:
    gymnasium.register("Bystander-v0", BystanderEnv)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a hostile module and hostile files, in which a checkpoint is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("evil_parts.py").write_text(EVIL)
    Path("evil").write_text("class_path: evil_parts.Net\n")
    Path("evil.yaml").write_text("class_path: evil_parts.Net\n")
    Path("harmless").write_text("class_path: lightning_hyper.nn.Concat\n")
    Path("secret").write_text("s3cr3t")
    before = {path.name for path in tmp_path.iterdir()}
    yield tmp_path
    assert "evil_parts" not in sys.modules
    assert {path.name for path in tmp_path.iterdir()} - before <= {"last.ckpt", "__pycache__"}


def written(recipe, /, **entries):
    model = PPO(actor=Concat, critic=Concat)
    model.build(Spaces.of(Pendulum(1)))
    checkpoint = {"recipe": recipe, "spaces": model.spaces.asdict(), "state_dict": model.state_dict(), "frames": 1}
    torch.save({**checkpoint, **entries}, "last.ckpt")
    return "last.ckpt"


def ppo(**arguments):
    return {"class_path": "PPO", "init_args": arguments}


def part(path, **arguments):
    return {"class_path": path, "init_args": arguments}


SEQUENTIAL = "torch.nn.Sequential"
LAYER = "torch.nn.TransformerEncoderLayer"
MODELS = {
    # Imports, wherever they stand.
    "class path": part("evil_parts.Net"),
    "of a part": ppo(actor=part("evil_parts.Net")),
    "short form": ppo(actor="evil_parts.Net"),
    "function": ppo(actor="evil_parts.make"),
    "in a list": ppo(context=[part("evil_parts.Net")]),
    "deep": ppo(actor=part("Hyper", trunk=part("evil_parts.Net"))),
    "dotted key": ppo(**{"actor.class_path": "evil_parts.Net"}),
    "of an instance": ppo(loss=part("evil_parts.Net")),
    "class in a class": ppo(actor="evil_parts.Outer.Inner"),
    "inheriting ours": ppo(actor=part("evil_parts.Outer")),
    "extra arguments": {**ppo(), "dict_kwargs": {"actor": part("evil_parts.Net")}},
    "unknown extra": {**ppo(), "dict_kwargs": {"zzz": part("evil_parts.Net")}},
    "of layers": ppo(encoder={"class_path": SEQUENTIAL, "dict_kwargs": {"args": [part("evil_parts.Net")]}}),
    "relative": ppo(actor=".evil_parts.Net"),
    "colon": ppo(actor="evil_parts:Net"),
    # YAML within a string.
    "YAML": ppo(actor="{class_path: evil_parts.Net}"),
    "YAML in YAML": ppo(actor="{class_path: Hyper, init_args: {trunk: '{class_path: evil_parts.Net}'}}"),
    "YAML list": ppo(context="[{class_path: evil_parts.Net}]"),
    "YAML tag": ppo(actor="!!python/object/apply:os.system ['touch touched']"),
    # Names that are found among the classes in memory.
    "short name": ppo(actor="BystanderNet"),
    "short class path": ppo(actor=part("BystanderNet")),
    "of the caller": ppo(actor=part(f"{__name__}.BystanderNet")),
    # What is imported already, and dangerous.
    "os.system": ppo(actor="os.system"),
    "Popen": ppo(actor=part("subprocess.Popen", args=["touch", "touched"])),
    "builtins": ppo(actor="builtins.exec"),
    "through ours": ppo(actor=part("lightning_hyper.sweep.launch.subprocess.Popen")),
    "through torch": ppo(actor=part("torch.nn.modules.module.torch.hub.load")),
    "torch.load": ppo(actor="torch.load"),
    "torch.save": ppo(actor="torch.save"),
    "our command": ppo(actor="lightning_hyper.cli.main"),
    "our processes": ppo(actor=part("lightning_hyper.sweep.launch.LocalProcesses")),
    "our files": ppo(actor=part("lightning_hyper.experience.replay_buffer.CompactReplayBuffer", memmap="touched")),
    "our maker": ppo(actor=part("lightning_hyper.envs.gym_make.Maker", id="evil_parts:X-v0")),
    "our writer": ppo(actor="lightning_hyper.envs.rendering.write_gif"),
    "our agent": ppo(actor="lightning_hyper.load"),
    "logger": ppo(actor=part("lightning.pytorch.loggers.CSVLogger", save_dir="touched")),
    "callback": ppo(loss=part("lightning.pytorch.callbacks.ModelCheckpoint")),
    "profiler": ppo(actor=part("lightning.pytorch.profilers.SimpleProfiler", dirpath="touched")),
    "parallel": ppo(actor=part("torch.nn.parallel.DataParallel")),
    "hook": ppo(actor="torch.nn.modules.module.register_module_forward_hook"),
    "jsonargparse": ppo(actor="jsonargparse.set_parsing_settings"),
    "activation": ppo(encoder=part(LAYER, nhead=1, activation="os.system")),
    # Strings that are read as files.
    "file": "evil",
    "file of the system": "/etc/hostname",
    "standard input": "-",
    "file of a part": ppo(actor="evil"),
    "harmless file": ppo(actor="harmless"),
    "YAML file": ppo(actor="evil.yaml"),
    "absolute file": ppo(actor=str(Path(__file__))),
    "secret": ppo(actor="secret"),
    "list in a file": ppo(context="evil"),
    "folder": ppo(actor="."),
    "address": ppo(actor="https://localhost:1/evil.yaml"),
    # No part at all.
    "number": 3,
    "list": ["PPO"],
    "nothing": None,
    "empty": {},
    "class path number": {"class_path": 3},
    "class path list": {"class_path": ["PPO"]},
    "null bytes": ppo(actor="a\0b"),
    "dunder": {**ppo(), "__class__": "evil_parts.Net"},
    "path": ppo(actor={"__path__": "evil", "class_path": "evil_parts.Net"}),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_that_names_what_is_not_ours_is_refused_in_one_line(here, model):
    with pytest.raises(CheckpointError) as caught:
        lightning_hyper.load(written({"model": model}))
    said = str(caught.value)
    assert "last.ckpt" in said
    assert "\n" not in said
    assert "s3cr3t" not in said


def test_what_is_trusted_is_imported_and_nothing_else(here):
    Path("evil_parts.py").rename("good_parts.py")
    Path("good_parts.py").write_text("from lightning_hyper.nn import Concat\nclass Net(Concat): pass\nimport os\n")
    model = ppo(actor=part("good_parts.Net"))
    assert lightning_hyper.load(written({"model": model}), trust=["good_parts"]).act([0.0, 0.0, 0.0]).shape == (1,)
    for path, named in {"good_parts.os.system": "posix.system", "good_parts_evil.Net": "good_parts_evil.Net"}.items():
        with pytest.raises(CheckpointError, match=f"names {named}"):
            lightning_hyper.load(written({"model": ppo(actor=path)}), trust=["good_parts"])
    sys.modules.pop("good_parts")
    Path("good_parts.py").unlink()


def test_of_a_recipe_only_the_model_is_looked_at(here):
    other = {
        "trainer": {"callbacks": [part("evil_parts.Net")], "logger": part("evil_parts.Net"), "profiler": "evil"},
        "data": part("evil_parts.Net"),
        "checkpoint": part("evil_parts.Net"),
        "root": "touched",
        "weights": "secret",
        "experiment": "../touched",
        "tracking_uri": "http://localhost:1",
        "evil_parts.Net": "evil_parts.Net",
    }
    assert lightning_hyper.load(written({"model": ppo(), **other})).act([0.0, 0.0, 0.0]).shape == (1,)


def test_a_memory_that_began_with_another_runs_needs_it_no_more(here):
    memory = part("EpisodicMemory", prefill="secret")
    model = part("RetrievalPPO", memory=memory, retriever=part("NearestRetriever"))
    assert lightning_hyper.load(written({"model": model})).act([0.0, 0.0, 0.0]).shape == (1,)


def gym(**arguments):
    return part("Gym", **{"id": "CartPole-v1", **arguments})


ENVS = {
    "module of the id": gym(id="evil_parts:Maze-v0"),
    "another's registration": gym(id="Bystander-v0"),
    "wrapper": gym(wrappers=["evil_parts.Net"]),
    "wrapper's class path": gym(wrappers=[{"class_path": "evil_parts.Net"}]),
    "wrapper in YAML": gym(wrappers="[{class_path: evil_parts.Net}]"),
    "wrapper that writes": gym(wrappers=[part("gymnasium.wrappers.RecordVideo", video_folder="touched")]),
    "argument": gym(arguments={"x": part("evil_parts.Net")}),
    "argument in YAML": gym(arguments={"x": "{class_path: evil_parts.Net}"}),
    "deep argument": gym(arguments={"x": [{"y": part("subprocess.Popen", args="touch touched")}]}),
    "task": gym(tasks=[{"x": part("evil_parts.Net")}]),
    "of trials": part("Trials", env=gym(id="evil_parts:Maze-v0")),
    "maker": part("lightning_hyper.envs.gym_make.Maker", id="evil_parts:Maze-v0"),
    "class path": part("evil_parts.Net"),
    "file": "evil",
}


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
def test_an_environment_that_is_not_ours_is_refused(here, env):
    with pytest.raises(RecipeError) as caught:
        refuse_foreign({"data": part("Rollouts", env=env)}, "ckpt_path")
    assert "ckpt_path" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "env",
    [
        gym(),
        gym(wrappers=[part("gymnasium.wrappers.FrameStackObservation", stack_size=2)]),
        gym(wrappers=["gymnasium.wrappers.ClipReward"], arguments={"max_episode_steps": 9}, device="cuda:0"),
        part("Trials", env=part("GridNavi")),
        part("MiniGrid", tasks=["MiniGrid-Empty-5x5-v0"]),
        part("Ant"),
    ],
)
def test_our_environments_are_taken(here, env):
    refuse_foreign({"data": part("Rollouts", env=env), "model": ppo(), "weights": "evil_parts.Net"}, "ckpt_path")


def test_within_the_limit_no_file_is_read_and_nothing_made_of_what_takes_anything(here):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module, sub_configs=True)
    parser.add_argument("--any", type=Any)
    flatten = part("torch.nn.Flatten")
    Path("harmless").write_text("class_path: torch.nn.Flatten")
    assert parser.parse_object({"net": "harmless"}).net.class_path == "torch.nn.Flatten"
    with limited():
        assert parser.instantiate(parser.parse_object({"any": flatten})).any["class_path"] == "torch.nn.Flatten"
        assert parser.parse_object({"net": flatten}).net.class_path == "torch.nn.Flatten"
        with pytest.raises(ArgumentError):
            parser.parse_object({"net": "harmless"})


def test_our_parts_are_few_kinds_of_classes():
    for path in own_parts():
        module, _, name = path.rpartition(".")
        assert issubclass(getattr(sys.modules[module], name), KINDS)
    rooms = {".".join(path.split(".")[:2]) for path in own_parts()} - {"torch.nn"}
    assert rooms == {room.__name__ for room in ROOMS}


def test_trusted_modules_may_register_environments_and_wrap_them(here):
    env = gym(id="mine:Maze-v0", wrappers=["mine.Wrapper"])
    with pytest.raises(RecipeError, match="names mine:Maze-v0"):
        refuse_foreign({"data": part("Rollouts", env=env)}, "ckpt_path")
    refuse_foreign({"data": part("Rollouts", env=env)}, "ckpt_path", ["mine"])
    refuse_foreign({"data": part("Rollouts", env=gym(id="Bystander-v0"))}, "ckpt_path", [__name__])


def test_the_callers_own_recipes_may_name_anything_afterwards(here):
    with pytest.raises(CheckpointError):
        lightning_hyper.load(written({"model": ppo(actor="os.system")}))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module, sub_configs=True)
    Path("harmless").write_text("class_path: torch.ao.nn.quantized.FloatFunctional")
    assert parser.parse_object({"net": "harmless"}).net.class_path == "torch.ao.nn.quantized.FloatFunctional"


class Payload:
    """Runs where an ordinary pickle is read."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("entry", ["recipe", "spaces", "state_dict", "frames", "ranks", "more"])
def test_no_pickle_runs(here, entry):
    with pytest.raises(CheckpointError, match=r"last.ckpt is truncated or no checkpoint"):
        lightning_hyper.load(written({"model": ppo()}, **{entry: Payload()}))


def test_the_generator_of_an_environments_state_is_one():
    from lightning_hyper.envs.gym_state import ForeignError, pack, unpack

    for name in ("seed", "test", "Generator", "nothing"):
        with pytest.raises(ForeignError):
            unpack({"kind": "generator", "state": pack({"bit_generator": name})})
