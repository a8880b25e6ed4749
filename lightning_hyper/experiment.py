"""A recipe made into a run: LightningCLI with the package's clock, checkpoints, tracking and folders around it."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_hyper import parts, recipes
from lightning_hyper.algorithms import Algorithm, NonFiniteLossError
from lightning_hyper.checkpoint_file import CheckpointError, read_checkpoint
from lightning_hyper.checks import RecipeError
from lightning_hyper.folder import Root, RunFolder
from lightning_hyper.layering import dump, flatten
from lightning_hyper.settings import Settings
from lightning_hyper.tracking import TrackingError
from lightning_hyper.training.checkpoint import Checkpoints, RunState
from lightning_hyper.training.matmul import choose_matmul
from lightning_hyper.training.mlflow import MLflowLogger, git_commit, hardware
from lightning_hyper.training.progress import ProgressBar
from lightning_hyper.training.run import Run
from lightning_hyper.training.stop import GracefulStop

RUN_FOLDER = "LIGHTNING_HYPER_RUN_FOLDER"  # tells the ranks that Lightning starts where the first one writes
TRACEBACK = "LIGHTNING_HYPER_TRACEBACK"
FREE_ON_RESUME = {f"data.init_args.{key}" for key in ("evaluate_every", "eval_envs", "eval_mode")}
HELP = re.compile(r"-h|--help|--[\w.]+\.help(=.*)?")


@dataclass(frozen=True)
class Call:
    """What a command line asks for.

    Args:
        verb: `fit`, `validate` or `test`.
        names: recipes, merged in order.
        checkpoint: `last`, `best`, or a path.
        overrides: options that are keys of the recipe, with their values.
        shown: where the resolved recipe is wanted and nothing else, what to leave out of it; else None.
    """

    verb: str
    names: Sequence[str] = ()
    checkpoint: str | None = None
    overrides: Sequence[str] = ()
    shown: str | None = None

    @classmethod
    def parse(cls, verb: str, words: Sequence[str]) -> Call:
        """Read a command line; what is no option of its own is left to the recipe."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-c", "--config", action="append", default=[])
        parser.add_argument("--ckpt_path")
        parser.add_argument("--print_config", nargs="?", const="")
        try:
            own, overrides = parser.parse_known_args(list(words))
        except argparse.ArgumentError as error:
            raise RecipeError(str(error).removeprefix("argument ")) from error
        return cls(verb, own.config, own.ckpt_path, overrides, own.print_config)

    @property
    def path(self) -> Path | None:
        """The checkpoint's path, where it is given as one."""
        return None if self.checkpoint in (None, "last", "best") else Path(str(self.checkpoint))

    def recipe(self) -> dict[str, Any]:
        """The recipe: that of the names, or else the checkpoint's, with the overrides over it."""
        if self.names:
            return recipes.override(recipes.resolve(self.names), self.overrides)
        if self.path is None:
            raise RecipeError("no recipe: name one with -c (see `lightning-hyper recipes`), or give a --ckpt_path")
        there = read_checkpoint(self.path)["recipe"]
        parts.refuse_foreign(there, "ckpt_path")
        given = {key: value for key, value in there.items() if key not in ("run", "parent")}
        return recipes.override(given, self.overrides)


class Command(LightningCLI):
    """The parser of recipes, and the objects made from one; starts nothing.

    Args:
        call: what the command line asks for.
        recipe: merged recipe; or words that ask the parser for help, which ends the process.

    Attributes:
        recipe: the resolved recipe, every key with its value.
        source: checkpoint that is continued or evaluated.
        folder: where the run writes.
    """

    def __init__(self, call: Call, recipe: dict[str, Any] | list[str]) -> None:
        self.call = call
        super().__init__(
            Algorithm,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults={
                "max_epochs": -1,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 5,
                "devices": 1,
                "enable_model_summary": False,
            },
            seed_everything_default=False,
            parser_kwargs={
                "prog": f"lightning-hyper {call.verb}",
                "description": "Options are the keys of a recipe: dots lead deeper, init_args may be left out.",
                "exit_on_error": False,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=recipe,
            run=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Lightning's own key, which has one value here: the key `seed` does more.
        parser.add_argument("--seed_everything", type=Literal[False], default=False, help=argparse.SUPPRESS)
        parser.add_class_arguments(Settings, None)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parts.parse(parser, args) if isinstance(args, Mapping) else parser.parse_args(list(args))

    def before_instantiate_classes(self) -> None:
        if (shown := self.call.shown) is not None:
            print(dump(self._resolved(skip_default="skip_default" in shown, skip_unset="skip_unset" in shown)), end="")
            raise SystemExit(0)
        self.recipe = self._resolved(skip_unset=False)
        self.settings = Settings(**{field.name: self.config[field.name] for field in fields(Settings)})
        if str(self.config.trainer.precision).startswith("16"):
            precision = self.config.trainer.precision
            raise RecipeError(f"trainer.precision is {precision!r}; choose '32-true' or 'bf16-mixed'")
        self._choose_folder()
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        if not torch.cuda.is_available():
            # Without a device every step of an optimiser looks for NVIDIA's library, a twentieth of a small update; not
            # so where no device is visible.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        seed_everything(self.settings.seed, workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        self.config_init = parts.instantiate(self.parser, self.config)  # Lightning's way to do it is deprecated
        self.datamodule, self.model = self.config_init.data, self.config_init.model
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.settings
        matmul = choose_matmul(self.continued.get("matmul", settings.matmul))
        rank_zero_info(matmul.sentence)
        weights = Path(settings.weights) if settings.weights is not None and not self.continued else None
        self.stop = GracefulStop()
        self.training = Run(
            settings.frames, seed=settings.seed, stop_at_return=settings.stop_at_return, weights=weights
        )
        self.logger = MLflowLogger(
            settings.root,
            settings.experiment,
            self.folder.name,
            clock=self.model.clock,
            tracking_uri=settings.tracking_uri,
            tags={
                **{key: str(self.recipe[key]) for key in ("paper", "method", "environment", "seed", "variant")},
                "git_commit": git_commit(),
                "hardware": hardware(),
                "matmul": matmul.name,
                "kind": self.call.verb,
            },
            parent=settings.parent,
            run_id=self.continued.get("run_id"),
        )
        state = RunState({"recipe": self.recipe, "matmul": matmul.name})
        named = self.config_init.trainer.callbacks or []
        named = named if isinstance(named, list) else [named]
        try:
            return super().instantiate_trainer(
                logger=self.logger,
                default_root_dir=str(self.folder.path),
                callbacks=[*named, self.training, self.stop, ProgressBar(), state],
                **kwargs,
            )
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise RecipeError(f"trainer: {error}") from error

    def run(self) -> int:
        """Train or evaluate; gives the exit code."""
        verb, trainer = self.call.verb, self.trainer
        os.environ[RUN_FOLDER] = str(self.folder.path)
        self.logger.open()
        self.logger.log_hyperparams(self.recipe)
        self.logger.log_text(yaml.safe_dump(self.recipe, sort_keys=False), "recipe.yaml")
        try:
            start = getattr(trainer, verb)
            start(self.model, datamodule=self.datamodule, ckpt_path=self.source, weights_only=True)
        except SystemExit:  # Lightning's way out of a second Ctrl-C
            if self.stop.signal is None:
                raise
        if self.stop.signal is not None:
            self.logger.finish("KILLED")
            rank_zero_info(f"Stopped at frame {self.model.clock.frames:,}; continue with --ckpt_path last")
            return 130
        if verb == "fit" and trainer.is_global_zero:
            for file in (self.folder.last, self.folder.best):
                if file.exists():
                    self.logger.log_artifact(file, "checkpoints")
            self.logger.flush()
            clock = self.model.clock
            self.folder.finish({"frames": clock.frames, "budget": clock.budget, **self.training.evaluated})
        return 0

    def _resolved(self, **skipped: bool) -> dict[str, Any]:
        text = self.parser.dump(self.config, format="yaml", skip_validation=True, **skipped)
        recipe: dict[str, Any] = yaml.safe_load(text)
        for key in ("seed_everything", "config"):
            recipe.pop(key, None)
        return recipe

    def _choose_folder(self) -> None:
        """Find the checkpoint, if one is asked for, and the folder: that of the run continued, or another one."""
        call, settings, root = self.call, self.settings, Root(Path(self.settings.root))
        stem = recipes.stem(call.names) or (RunFolder.of_checkpoint(call.path).name if call.path else "run")
        seeded = f"{stem}-seed{settings.seed}"
        self.source = call.path
        if call.checkpoint is not None and self.source is None:
            wanted = settings.run or seeded
            self.source = root.newest(settings.experiment, wanted, call.checkpoint)
            if self.source is None:
                place = root.path / settings.experiment
                raise RecipeError(f"ckpt_path: there is no {call.checkpoint}.ckpt of a run {wanted!r} in {place}")
        checkpoint = read_checkpoint(self.source) if self.source else {}
        if checkpoint:
            _require_same(checkpoint["recipe"], self.recipe, call.verb)
        self.continued: dict[str, Any] = checkpoint if call.verb == "fit" else {}
        if self.continued and self.source:
            self.folder = RunFolder.of_checkpoint(self.source)
        elif RUN_FOLDER in os.environ and "LOCAL_RANK" in os.environ:
            self.folder = RunFolder(Path(os.environ[RUN_FOLDER]))
        elif settings.run is None:
            name = seeded if call.verb == "fit" else f"{stem}-{call.verb}"
            self.folder = root.unused(settings.experiment, name)
        else:
            self.folder = root.run(settings.experiment, settings.run)
            if self.folder.checkpoints.exists():
                path = self.folder.path
                raise RecipeError(f"run: {path} has checkpoints already; continue it with --ckpt_path last, or rename")


def main(argv: Sequence[str]) -> int:
    """Run `fit`, `validate` or `test` with the arguments of the command line; gives the exit code.

    0 after a finished run, 1 after a failed one, 2 for a recipe or command at fault, 130 after Ctrl-C. What is nobody's
    fault but the code's is raised.
    """
    verb, *words = argv
    _quieten()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe may name a class of a file beside it
    try:
        if asked := [k for k, word in enumerate(words) if HELP.fullmatch(word)]:
            Command(Call(verb), words[asked[0] : asked[0] + 1 + words[asked[0]].endswith(".help")])
        call = Call.parse(verb, words)
        return Command(call, call.recipe()).run()
    except (RecipeError, CheckpointError, TrackingError, NonFiniteLossError, ArgumentError, OSError) as error:
        if os.environ.get(TRACEBACK) or (isinstance(error, OSError) and error.errno is not None):  # the system's own
            raise
        said = parts.sentence(str(error)) if isinstance(error, ArgumentError) else error
        print(f"lightning-hyper {verb}: error: {said}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLossError) else 2


def _require_same(there: Mapping[str, Any], here: Mapping[str, Any], verb: str) -> None:
    """Refuse a checkpoint of another recipe, naming the keys that differ."""
    keys = ("model", "data") if verb == "fit" else ("model",)
    old, new = (flatten({key: recipe[key] for key in keys}) for recipe in (there, here))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in FREE_ON_RESUME]
    if differing:
        shown = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in differing[:5])
        raise RecipeError(f"ckpt_path: the checkpoint is of another recipe ({shown})")


def _quieten() -> None:
    """Leave out what other packages say at every start, none of which a user can act on."""
    hints = ("GPU available", "TPU available", "💡")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(hints))
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Experience continues exactly, by ways of our own: see `RunState`.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
