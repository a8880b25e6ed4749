"""Every recipe that ships, and every product of layers that something names, parses; every method learns."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer

from lightning_hyper import parts, recipes
from lightning_hyper.algorithms import Algorithm
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.layering import Loader, flatten
from lightning_hyper.settings import Settings

FOLDER = recipes.folder()
RENAMED = yaml.safe_load((FOLDER / recipes.RENAMED).read_text())
PAGES = [FOLDER.parent / "README.md", *sorted(FOLDER.glob("*/README.md"))]


def commands(text: str) -> list[tuple[str, ...]]:
    """The layers that each command of a text is given; a sweep has several such recipes."""
    text = re.sub(r"\\\n#?\s*", "", text)
    found = []
    for verb, rest in re.findall(r"lightning-hyper (fit|sweep) ([^\n`]+)", text):
        given = tuple(re.findall(r"-c (\S+)", rest))
        found += ["+".join(given)] if verb == "fit" else given
    return [tuple(given.split("+")) for given in found if "/" in given and "$" not in given]


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("#"))


BY_FILE = {name: commands(header(name)) for name in recipes.names()}
NAMED = dict.fromkeys(
    [
        *(given for found in BY_FILE.values() for given in found),
        *((name,) for name in RENAMED if "/_" not in name),  # which were layers
        *(given for page in PAGES for given in commands(page.read_text())),
    ]
)


@cache
def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_subclass_arguments(Algorithm, "model")
    made.add_subclass_arguments(LightningDataModule, "data")
    made.add_class_arguments(Trainer, "trainer", instantiate=False, skip={"logger"})
    made.add_class_arguments(Settings, None)
    return made


@cache
def check(part: str) -> None:
    parts.instantiate(parser(), parts.parse(parser(), json.loads(part)))


@pytest.mark.parametrize("given", NAMED, ids="+".join)
def test_what_something_names_is_a_recipe(given: tuple[str, ...]) -> None:
    recipe = recipes.resolve(given)
    assert {"method", "environment", "experiment", "model", "data"} <= recipe.keys()
    for key, value in recipe.items():  # one by one, as products have most of them in common
        check(json.dumps({key: value}))


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_what_it_is_and_how_it_is_run(name: str) -> None:
    assert header(name).startswith(f"# {name}   ")
    assert BY_FILE[name], "no command"


@pytest.mark.parametrize("name", recipes.names())
def test_what_a_recipe_says_holds_in_its_own_command(name: str) -> None:
    given = BY_FILE[name][0]
    says = yaml.load((FOLDER / f"{name}.yaml").read_text(), Loader=Loader)  # numbers as recipes have them
    own = {key: value for key, value in flatten(says).items() if key != "layers" and not key.endswith("+")}
    product = flatten(recipes.resolve(given))
    assert name in given
    assert {key: product.get(key) for key in own} == own


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_is_free_for_what_it_has_become(name: str) -> None:
    assert not (FOLDER / f"{name}.yaml").exists()
    assert all((FOLDER / f"{layer}.yaml").exists() for layer in RENAMED[name])


GRIDNAVI = ["--data.env.env.num_envs", "8", "--data.env.episodes", "2", "--data.env.env.episode_steps", "5"]
MINIGRID = ["--data.env.num_envs", "6", "--data.env.levels", "2", "--data.steps", "16", "--model.minibatches", "2"]
REPLAY = ["--data.steps", "20", "--data.warmup_frames", "20", "--data.updates_per_frame", "0.1"]
REPLAY += ["--data.capacity", "100", "--data.batch_size", "8"]
TRUNK = ["--model.critic.trunk.widths", "[16, 16]"]
GYM = ["--data.steps", "16", "--model.epochs", "1"]


def methods(pattern: str, names: str, options: list[str]) -> dict[str, list[str]]:
    return {pattern.format(name): options for name in names.split()}


METHODS = {
    **methods("recurrent/gridnavi+recurrent/{}", "rnn rnn_s rnn_hn rnn_film multi multi_hn", GRIDNAVI),
    **methods(
        "recurrent/gridnavi+recurrent/rnn_hn+recurrent/variants/{}",
        "lstm transformer trunk last_layer show show_at_start_cell",
        GRIDNAVI,
    ),
    **methods("recurrent/{}", "gridnavi_rnn_hn_paper gridnavi_paper+recurrent/rnn", GRIDNAVI),
    **methods("building_blocks/{}+building_blocks/reacher", "td3 sac", REPLAY),
    **methods(
        "building_blocks/td3+building_blocks/critics/{}+building_blocks/reacher",
        "sa_hyper as_hyper constant_hyper residual_features",
        REPLAY + TRUNK,
    ),
    **methods("building_blocks/sac+building_blocks/critics/{}+building_blocks/reacher", "d2rl film small", REPLAY),
    **methods(
        "building_blocks/td3+building_blocks/critics/sa_hyper+building_blocks/reacher+building_blocks/variants/{}",
        "n_step prioritized shared_trunk normalized",
        REPLAY + TRUNK,
    ),
    **methods(
        "retrieval/three+retrieval/{}",
        "mppo mppo_task ppo_hypernet retrieval mppo_task_memory retrieval_memory retrieval_published",
        MINIGRID,
    ),
    **methods(
        "retrieval/three+retrieval/retrieval+retrieval/ablations/{}",
        "inverse_distance plain_projection own_task heads best_return task_quota newest memory1000",
        MINIGRID,
    ),
    **methods("gymnasium/{}", "ppo ppo+gymnasium/recurrent cartpole+gymnasium/dictionary", GYM),
    "gymnasium/trials": ["--data.env.env.num_envs", "4", "--model.epochs", "1"],
    **methods("gymnasium/{}", "td3 sac", REPLAY),
}


def made(recipe: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return parts.instantiate(parser(), parts.parse(parser(), {key: recipe[key] for key in ("model", "data")}))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_from_two_batches(name: str) -> None:
    objects = made(recipes.override(recipes.resolve([name]), METHODS[name]))
    model, data = objects.model, objects.data
    data.connect()
    model.build(Spaces.of(data.env))
    model.check(data.env.batch_size.numel(), data.steps)
    data.begin(model.policy, budget=10_000)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    measured = [update for _ in range(2) for update in model.learn(data.collect())]
    assert measured
    assert all(bool(value.isfinite()) for update in measured for value in update.values())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
