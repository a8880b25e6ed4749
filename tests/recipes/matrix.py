"""Every context x conditioning x algorithm x environment: trained for two batches, or refused in one sentence.

`python tests/recipes/matrix.py` prints a table for each algorithm and environment, and every refusal once.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import defaultdict

import torch
from jsonargparse import ArgumentParser

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Experience
from lightning_hyper.parts import instantiate, parse

SMALL = {"hidden": [4]}
GRU = {"class_path": "GRU", "init_args": {"hidden": 4}}
RECURRENT = {"class_path": "RecurrentContext", "init_args": {"encoder": GRU}}
VARIATIONAL = {"class_path": "VariationalContext", "init_args": {"encoder": GRU, "trials": 1, "capacity": 4}}
CARTPOLE = {"class_path": "Gym", "init_args": {"id": "CartPole-v1", "num_envs": 4}}
CONTEXTS = {
    "none": None,
    "task": {"class_path": "TaskContext"},
    "one-hot": {"class_path": "OneHotContext"},
    "text": {"class_path": "TextContext", "init_args": {"outputs": 4}},
    "constant": {"class_path": "ConstantContext"},
    "recurrent": RECURRENT,
    "variational": VARIATIONAL,
    "one-hot, recurrent": [{"class_path": "OneHotContext"}, RECURRENT],
}
CONDITIONING = ("MLP", "Concat", "FiLM", "Hyper", "ContextOnly")
GRIDNAVI = {"class_path": "GridNavi", "init_args": {"num_envs": 4, "episode_steps": 4}}
TASKS = ["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0"]
ENVIRONMENTS = {
    "CartPole": CARTPOLE,
    "Pendulum": {"class_path": "Gym", "init_args": {"id": "Pendulum-v1", "num_envs": 4}},
    "HalfCheetah": {"class_path": "HalfCheetah", "init_args": {"num_envs": 4}},
    "MiniGrid": {"class_path": "MiniGrid", "init_args": {"num_envs": 4, "levels": 4, "tasks": TASKS}},
    "GridNavi": GRIDNAVI,
    "trials of GridNavi": {"class_path": "Trials", "init_args": {"env": GRIDNAVI}},
    "trials of Pendulum": {
        "class_path": "Trials",
        "init_args": {
            "env": {
                "class_path": "Gym",
                "init_args": {"id": "Pendulum-v1", "num_envs": 4, "tasks": [{"g": 5.0}, {"g": 10.0}]},
            },
        },
    },
    "trials of CartPole": {"class_path": "Trials", "init_args": {"env": CARTPOLE}},
}
ALGORITHMS = ("PPO", "RetrievalPPO", "TD3", "SAC")


def cells():
    """Names of every cell: algorithm, environment, context, conditioning."""
    return itertools.product(ALGORITHMS, ENVIRONMENTS, CONTEXTS, CONDITIONING)


def recipe(algorithm, environment, context, conditioning):
    """`model` and `data` of a cell."""
    network = {"class_path": conditioning, "init_args": SMALL}
    model = {"actor": network, "critic": network, "context": CONTEXTS[context]}
    if environment == "MiniGrid":
        model["encoder"] = {"class_path": "GridEncoder", "init_args": {"channels": [2, 2, 4]}}
    data = {"env": ENVIRONMENTS[environment], "eval_envs": 2, "evaluate_every": None}
    if algorithm in ("TD3", "SAC"):
        if context != "none":
            model["critic_context"] = ["task"]
        data |= {"steps": 8, "warmup_frames": 16, "batch_size": 4, "capacity": 200, "updates_per_frame": 0.1}
        data |= {"sequence": 4} if context == "variational" or "recurrent" in context else {}
    else:
        model["minibatches"] = 2
        data["steps"] = 8
    if algorithm == "RetrievalPPO":
        model["memory"] = {"class_path": "EpisodicMemory", "init_args": {"capacity": 6}}
        model["retriever"] = {"class_path": "AttentionRetriever", "init_args": {"subset": 3}}
    source = "Replay" if algorithm in ("TD3", "SAC") else "Rollouts"
    return {
        "model": {"class_path": algorithm, "init_args": model},
        "data": {"class_path": source, "init_args": data},
    }


def outcome(*cell):
    """Empty where the cell trains for two batches; what the refusal says where it does not.

    Raises:
        Exception: anything but a refusal is a fault.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Algorithm, "model")
    parser.add_subclass_arguments(Experience, "data")
    torch.manual_seed(0)
    try:
        made = instantiate(parser, parse(parser, recipe(*cell)))
        made.data.connect()
        made.model.build(Spaces.of(made.data.env))
        made.model.check(made.data.env.batch_size.numel(), made.data.steps)
        made.data.begin(made.model.policy)
    except RecipeError as refusal:
        return " ".join(str(refusal).split())
    for _ in range(3):
        before = [parameter.clone() for parameter in made.model.policy.parameters()]
        updates = made.model.learn(made.data.collect())
    assert updates
    assert all(value.isfinite().all() for update in updates for value in update.values())
    changed = zip(before, made.model.policy.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in changed)
    return ""


def main():
    """Print the tables; 1 where a cell is a traceback."""
    warnings.simplefilter("ignore")
    said, faults = {}, 0
    tables = defaultdict(dict)
    for cell in cells():
        algorithm, environment, context, conditioning = cell
        try:
            text = outcome(*cell)
            mark = "trained" if not text else f"({said.setdefault(text, len(said) + 1)})"
        except Exception as error:
            faults += 1
            mark = f"FAULT {type(error).__name__}: {error}"
        tables[algorithm, environment][context, conditioning] = mark
    for (algorithm, environment), marks in tables.items():
        print(f"\n{algorithm} on {environment}\n{'':20}" + "".join(f"{name:12}" for name in CONDITIONING))
        for context in CONTEXTS:
            print(f"{context:20}" + "".join(f"{marks[context, name]:12}" for name in CONDITIONING))
    print()
    for text, number in said.items():
        print(f"({number}) {text}")
    trained = sum(mark == "trained" for marks in tables.values() for mark in marks.values())
    total = sum(map(len, tables.values()))
    print(f"\n{trained} of {total} trained, {total - trained - faults} refused, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
