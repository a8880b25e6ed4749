"""Options of Lightning's trainer that have no place in a recipe, because a key of ours says the same, or more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_hyper.checks import RecipeError, shown

EVALUATED = "evaluations come every data.evaluate_every frames, over data.eval_envs episodes"
ENDED = "training ends by frames"
OURS = {
    "logger": "runs are logged to MLflow: see experiment and tracking_uri",
    "default_root_dir": "everything is written under root",
    "max_epochs": ENDED,
    "min_epochs": ENDED,
    "min_steps": ENDED,
    "limit_train_batches": ENDED,
    "overfit_batches": "every batch is collected anew",
    "limit_val_batches": EVALUATED,
    "limit_test_batches": EVALUATED,
    "limit_predict_batches": "there is nothing to predict",
    "check_val_every_n_epoch": EVALUATED,
    "val_check_interval": EVALUATED,
    "num_sanity_val_steps": EVALUATED,
    "reload_dataloaders_every_n_epochs": "every batch is collected anew",
    "enable_checkpointing": "checkpoints are written by checkpoint",
    "accumulate_grad_batches": "set model.minibatches, or data.batch_size of off-policy experience",
    "gradient_clip_val": "set model.max_grad_norm",
    "gradient_clip_algorithm": "set model.max_grad_norm",
    "use_distributed_sampler": "every rank collects its own batches",
    "barebones": "without it a run could be neither evaluated nor continued",
    "model_registry": "checkpoints go to MLflow",
}
PRECISIONS = ("32-true", "bf16-mixed")


def check_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that a trainer's options leave alone what the package decides.

    Args:
        given: all options of a recipe.
        defaults: what each is where a recipe says nothing.

    Raises:
        RecipeError: one of them does not.
    """
    for key, reason in OURS.items():
        if key in given and given[key] is not None and given[key] != defaults.get(key):
            raise RecipeError(f"trainer.{key} is {shown(given[key])}; leave it out: {reason}")
    precision = given.get("precision")
    if str(precision) not in ("None", "32", *PRECISIONS):
        raise RecipeError(f"trainer.precision is {precision!r}; choose '32-true' or 'bf16-mixed'")


def blamed(given: Mapping[str, Any], defaults: Mapping[str, Any], error: Exception) -> RecipeError:
    """What the trainer refuses, by the keys that it names, or else by all that a recipe sets."""
    own = {key: value for key, value in given.items() if value != defaults.get(key) and key != "callbacks"}
    text = " ".join(str(error).split()) or type(error).__name__
    by_name = {key: value for key, value in own.items() if re.search(rf"\b{key}\b", text)}
    named = by_name or {key: value for key, value in own.items() if str(value) in text} or own
    keys = ", ".join(f"trainer.{key} is {shown(value)}" for key, value in named.items()) or "trainer"
    return RecipeError(f"{keys}: {text}")
