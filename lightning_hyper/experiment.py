"""A recipe made into a run: LightningCLI with the package's clock, checkpoints, tracking and folders around it."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
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
from lightning_hyper.tracking import TrackingError, without_password
from lightning_hyper.training.checkpoint import Checkpoints, DirectCheckpointIO, RunState
from lightning_hyper.training.machine import git_commit, hardware
from lightning_hyper.training.matmul import choose_matmul
from lightning_hyper.training.mlflow import MLflowLogger
from lightning_hyper.training.options import blamed, check_options
from lightning_hyper.training.progress import ProgressBar
from lightning_hyper.training.run import Run
from lightning_hyper.training.stop import GracefulStop

RUN_FOLDER = "LIGHTNING_HYPER_RUN_FOLDER"  # tells the ranks that Lightning starts where the first one writes
TRACEBACK = "LIGHTNING_HYPER_TRACEBACK"
# What may change where a run goes on, by the last part of its key: how it is optimised, evaluated and computed.
FREE_ON_RESUME = re.compile(
    r"(\w+_)?lr|lr_schedule|max_grad_norm|compile|storage|evaluate_every|eval_envs|eval_mode", flags=re.A
)
# What is taken of the recipe in a checkpoint. Callbacks, loggers, folders and addresses are not: a file is data.
TAKEN = ("model", "data", "frames", "seed", "stop_at_return", "paper", "method", "environment", "variant")
HELP = re.compile(r"-h|--help|--[\w.]+\.help(=.*)?")


@dataclass(frozen=True)
class Call:
    """What a command line asks for.

    Args:
        verb: `fit`, `validate` or `test`.
        names: recipes, merged in order.
        checkpoint: name of one of the run's, such as `last`, `best` or `frames=1000`, or a path.
        trust: modules, packages or classes that the recipe in a checkpoint may name besides the package's own.
        overrides: options that are keys of the recipe, with their values.
        shown: where the resolved recipe is wanted and nothing else, what to leave out of it; else None.
        words: the command line after the verb.
    """

    verb: str
    names: Sequence[str] = ()
    checkpoint: str | None = None
    trust: Sequence[str] = ()
    overrides: Sequence[str] = ()
    shown: str | None = None
    words: Sequence[str] = ()

    @classmethod
    def parse(cls, verb: str, words: Sequence[str]) -> Call:
        """Read a command line; what is no option of its own is left to the recipe."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-c", "--config", action="append", default=[])
        parser.add_argument("--ckpt_path")
        parser.add_argument("--trust", action="append", default=[])
        parser.add_argument("--print_config", nargs="?", const="")
        try:
            own, overrides = parser.parse_known_args(list(words))
        except argparse.ArgumentError as error:
            raise RecipeError(str(error).removeprefix("argument ")) from error
        return cls(verb, own.config, own.ckpt_path, own.trust, overrides, own.print_config, words)

    @property
    def command(self) -> str:
        """The command line, without passwords."""
        return without_password(shlex.join(["lightning-hyper", self.verb, *self.words]))

    @property
    def path(self) -> Path | None:
        """The checkpoint's path, where it is given as one."""
        text = self.checkpoint
        return Path(text) if text is not None and ("/" in text or os.sep in text or text.endswith(".ckpt")) else None

    def gives(self, key: str) -> bool:
        """Whether the command line itself says a key."""
        return any(word.partition("=")[0] == f"--{key}" for word in self.overrides)

    def recipe(self) -> dict[str, Any]:
        """The recipe: that of the names, or else the checkpoint's, with the overrides over it."""
        if self.names:
            return recipes.override(recipes.resolve(self.names), self.overrides)
        if self.path is None:
            raise RecipeError("no recipe: name one with -c (see `lightning-hyper recipes`), or give a --ckpt_path")
        there = read_checkpoint(self.path)["recipe"]
        parts.refuse_foreign(there, "ckpt_path", self.trust)
        given = {key: there[key] for key in TAKEN if key in there}
        given["trainer"] = {"precision": there.get("trainer", {}).get("precision", "32-true")}
        if there.get("trainer", {}).get("callbacks"):
            rank_zero_info(
                "The callbacks of the checkpoint's recipe are left out; to have them, name the recipe with -c"
            )
        if (folder := RunFolder.of_checkpoint(self.path)) is not None:
            given |= {"root": str(folder.root), "experiment": folder.experiment}
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
        check_options(self.config.trainer.as_dict(), self._trainer_defaults())
        self._find_checkpoint()
        self.folder = self._choose_folder()
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
        weights = Path(settings.weights) if settings.weights is not None else None
        self.stop = GracefulStop()
        self.training = Run(
            settings.frames,
            seed=settings.seed,
            stop_at_return=settings.stop_at_return,
            weights=weights,
            greeting=matmul.sentence,
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
                "command": self.call.command,
            },
            parent=settings.parent,
            run_id=self.continued.get("run_id") if self.in_place else None,
            frames=self.continued.get("frames") if self.in_place else None,
        )
        state = RunState({"recipe": self.recipe, "matmul": matmul.name})
        named = _listed(self.config_init.trainer.callbacks)
        try:
            return super().instantiate_trainer(
                logger=self.logger,
                default_root_dir=str(self.folder.path),
                callbacks=[*named, self.training, self.stop, ProgressBar(), state],
                plugins=[*_listed(self.config_init.trainer.plugins), DirectCheckpointIO()],
                **kwargs,
            )
        except (ValueError, TypeError, RuntimeError, ImportError, AttributeError, MisconfigurationException) as error:
            raise blamed(self.config.trainer.as_dict(), self._trainer_defaults(), error) from error

    def run(self) -> int:
        """Train or evaluate; gives the exit code."""
        os.environ[RUN_FOLDER] = str(self.folder.path)
        writes = self.call.verb == "fit" and self.trainer.is_global_zero
        lock = self.folder.claim() if writes else None
        try:
            return self._run()
        finally:
            if lock is not None and self.logger.begun:
                lock.release()
            elif lock is not None:
                self.folder.unclaim(lock)

    def _run(self) -> int:
        verb, trainer = self.call.verb, self.trainer
        self.logger.open()
        self.logger.log_hyperparams(self.recipe)
        self.logger.log_text(yaml.safe_dump(self.recipe, sort_keys=False), "recipe.yaml")
        try:
            start = getattr(trainer, verb)
            start(self.model, datamodule=self.datamodule, ckpt_path=self.source, weights_only=True)
        except SystemExit:  # Lightning's way out of a second Ctrl-C
            if self.stop.signal is None:
                raise
        clock = self.model.clock
        if self.stop.stopped or self.stop.signal is not None:
            self.logger.finish("KILLED")
            rank_zero_info(f"Stopped at frame {clock.frames:,}; continue with --ckpt_path last")
            return 130
        if verb == "fit" and not self.training.finished:
            self.logger.finish("KILLED")
            rank_zero_info(
                f"Ended by a limit of the trainer's at frame {clock.frames:,} of {clock.budget:,}; continue with "
                "--ckpt_path last"
            )
        elif verb == "fit" and trainer.is_global_zero:
            for file in (self.folder.last, self.folder.best):
                if file.exists():
                    self.logger.log_artifact(file, "checkpoints")
            self.logger.flush()
            self.folder.finish({"frames": clock.frames, "budget": clock.budget, **self.training.evaluated})
        return 0

    def _trainer_defaults(self) -> dict[str, Any]:
        found: dict[str, Any] = self.parser.get_defaults().trainer.as_dict()
        return found

    def _resolved(self, **skipped: bool) -> dict[str, Any]:
        text = self.parser.dump(self.config, format="yaml", skip_validation=True, **skipped)
        recipe: dict[str, Any] = yaml.safe_load(text)
        for key in ("seed_everything", "config"):
            recipe.pop(key, None)
        if recipe.get("tracking_uri"):
            recipe["tracking_uri"] = without_password(recipe["tracking_uri"])
        return recipe

    def _find_checkpoint(self) -> None:
        """Read the checkpoint, if one is asked for, and take over what a continued run cannot change."""
        call, settings = self.call, self.settings
        self.source, self.in_place = call.path, False
        self.continued: dict[str, Any] = {}
        if call.checkpoint is None:
            return
        if self.source is None:
            wanted = settings.run or self._stem()
            self.source = Root(Path(settings.root)).newest(settings.experiment, wanted, call.checkpoint)
            if self.source is None:
                place = Path(settings.root) / settings.experiment
                raise RecipeError(f"ckpt_path: there is no {call.checkpoint}.ckpt of a run {wanted!r} in {place}")
        checkpoint, folder = read_checkpoint(self.source), RunFolder.of_checkpoint(self.source)
        changed = _require_same(checkpoint["recipe"], self.recipe, call.verb)
        if call.verb != "fit":
            return
        # Not the whole checkpoint, which would stay in memory for as long as the run goes on.
        self.continued = {key: checkpoint[key] for key in ("matmul", "run_id", "frames") if key in checkpoint}
        self.in_place = folder is not None
        kept: dict[str, Any] = {"seed": checkpoint["recipe"].get("seed", settings.seed), "weights": None}
        if folder is not None:
            kept |= {"root": str(folder.root), "experiment": folder.experiment, "run": folder.name}
        for key, value in kept.items():
            given = getattr(settings, key)
            same = Path(given).resolve() == Path(value) if key == "root" else given == value
            if call.gives(key) and not same and not (key == "run" and call.path is None):  # `a` finds `a-2`, too
                raise RecipeError(f"{key} is {given!r}; a run that is continued has its own, {value!r}: leave it out")
        self.settings = replace(settings, **kept)
        self.recipe |= {key: value for key, value in kept.items() if key in ("seed", "root", "experiment")}
        for key, (old, new) in changed.items():
            rank_zero_info(f"{key.replace('.init_args', '')} is {new!r} from here on ({old!r} so far)")

    def _choose_folder(self) -> RunFolder:
        """Folder of this run: that of the run continued, or another one."""
        call, settings, root = self.call, self.settings, Root(Path(self.settings.root))
        if RUN_FOLDER in os.environ and "LOCAL_RANK" in os.environ:
            return RunFolder(Path(os.environ[RUN_FOLDER]))
        if self.in_place:
            return root.run(settings.experiment, str(settings.run))
        if settings.run is None:
            return root.unused(
                settings.experiment, self._stem() if call.verb == "fit" else f"{self._stem()}-{call.verb}"
            )
        folder = root.run(settings.experiment, settings.run)
        if folder.has_checkpoints:
            raise RecipeError(
                f"run: {folder.path} has checkpoints already; continue it with --ckpt_path last, or rename"
            )
        return folder

    def _stem(self) -> str:
        """What a run is called that is given no name."""
        folder = RunFolder.of_checkpoint(self.call.path) if self.call.path else None
        stem = recipes.stem(self.call.names) or (folder.name if folder else "run")
        return f"{stem}-seed{self.settings.seed}" if self.call.verb == "fit" else stem


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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _require_same(there: Mapping[str, Any], here: Mapping[str, Any], verb: str) -> dict[str, tuple[Any, Any]]:
    """Refuse a checkpoint of another recipe, naming the keys that differ; gives what differs and may, old and new."""
    keys = ("model", "data") if verb == "fit" else ("model",)
    old, new = (flatten({key: recipe.get(key) or {} for key in keys}) for recipe in (there, here))
    changed = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    free = {key: pair for key, pair in changed.items() if FREE_ON_RESUME.fullmatch(key.rpartition(".")[2])}
    if differing := [key for key in changed if key not in free]:
        shown = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in differing[:5])
        raise RecipeError(f"ckpt_path: the checkpoint is of another recipe ({shown})")
    return free


def _quieten() -> None:
    """Leave out what other packages say at every start, none of which a user can act on."""
    hints = ("GPU available", "TPU available", "💡")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(hints))
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Experience continues exactly, by ways of our own: see `RunState`.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
