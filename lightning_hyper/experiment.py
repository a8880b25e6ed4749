"""A recipe made into a run: LightningCLI with the package's clock, checkpoints, tracking and folders around it."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

# More threads than one slow small networks down; `threads` in a recipe asks for more. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_hyper import envs, experience, nn, objectives, recipes  # noqa: F401  their classes have short names
from lightning_hyper.agent import Agent
from lightning_hyper.algorithms import Algorithm, NonFiniteLossError
from lightning_hyper.analysis import attention, gradient_similarity  # noqa: F401  their callbacks have short names
from lightning_hyper.checkpoint_file import CheckpointError, read_checkpoint
from lightning_hyper.recipes import RecipeError
from lightning_hyper.tracking import TrackingError
from lightning_hyper.training.checkpoint import Checkpoints, RunState
from lightning_hyper.training.clock import FrameBudget, GracefulStop
from lightning_hyper.training.matmul import choose_matmul
from lightning_hyper.training.mlflow import MLflowLogger, git_commit, hardware
from lightning_hyper.training.progress import ProgressBar

RUN_FOLDER = "LIGHTNING_HYPER_RUN_FOLDER"
TRACEBACK = "LIGHTNING_HYPER_TRACEBACK"
FREE_ON_RESUME = {"data.init_args.batches_per_epoch", "data.init_args.eval_envs", "data.init_args.eval_mode"}


class OneLineParser(LightningArgumentParser):
    """Says what is wrong with a recipe in a few words, where jsonargparse prints its usage and the whole recipe."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip(" -") for line in message.partition("Given value")[0].splitlines()]
        noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>")
        said = [line.partition(" Got value:")[0] for line in lines if line and not line.startswith(noise)]
        raise RecipeError(" ".join(said))


class Command(LightningCLI):
    """The parser of `fit`, `validate` and `test`, and the objects made from a recipe; does not start anything."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
        return dict.fromkeys(("fit", "validate", "test"), skipped)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        add("--frames", type=int, default=1_000_000, help="Environment frames to train for, all ranks together.")
        add("--seed", type=int, default=0, help="Seed of weights, tasks, actions and minibatches.")
        add("--experiment", type=str, default="default", help="MLflow experiment, and folder under the root.")
        add("--root", type=str, default="runs", help="Folder under which everything that a run writes lies.")
        add("--run", type=str | None, default=None, help="Name of the run; made from recipe and seed by default.")
        add("--paper", type=str, default="", help="arXiv number of the paper; a tag.")
        add("--method", type=str, default="", help="Name of the method; a tag, by which reports group runs.")
        add("--environment", type=str, default="", help="Name of the environment; a tag, by which reports group runs.")
        add("--variant", type=str, default="", help="What a sweep varies in this run; a tag.")
        add("--parent", type=str | None, default=None, help="MLflow id of the parent run; a sweep sets it.")
        add(
            "--tracking_uri", type=str | None, default=None, help="MLflow server; a database under the root by default."
        )
        add("--weights", type=str | None, default=None, help="Checkpoint whose weights training begins with.")
        add("--stop_at_return", type=float | None, default=None, help="End early at this eval/return.")
        add("--video", type=int, default=300, help="Frames of the video of the trained policy; 0 makes none.")
        add("--threads", type=int | None, default=None, help="Threads of PyTorch; OMP_NUM_THREADS, else 1, by default.")
        add(
            "--matmul",
            type=Literal["auto", "default"],
            default="auto",
            help="float32 matrix products on CPUs: probe for a faster path that is as exact, or leave PyTorch's.",
        )
        parser.add_class_arguments(Checkpoints, "checkpoint")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults(
            {
                "trainer.max_epochs": -1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": 5,
                "trainer.devices": 1,
                "trainer.enable_model_summary": False,
            }
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without Lightning's warning on arguments beside sys.argv

    def _parse_ckpt_path(self) -> None:
        pass  # Lightning would merge hyper-parameters out of the checkpoint; the recipe is the only source here.

    def _set_seed(self) -> None:
        from lightning.pytorch import seed_everything

        seed_everything(self.config[self.config["subcommand"]]["seed"], workers=True, verbose=False)

    def instantiate_trainer(self, **_: Any) -> Any:
        return None  # made later, when the folder of the run is known

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe: every key with its value."""
        config = self.config[self.subcommand].clone()
        config.pop("ckpt_path", None)
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        resolved: dict[str, Any] = yaml.safe_load(text)
        resolved.pop("ckpt_path", None)
        return resolved


def main(argv: Sequence[str]) -> int:
    """Run `fit`, `validate` or `test` with the arguments of the command line; gives the exit code.

    0 after a finished run, 1 after a failed one, 2 for a recipe or command at fault, 130 after Ctrl-C.
    """
    verb, *rest = argv
    _quieten()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe may name a class of a file beside it
    try:
        return _run(verb, rest)
    except (RecipeError, CheckpointError, TrackingError, ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        cause: BaseException = error
        while str(cause).startswith("Does not validate") and cause.__cause__ is not None:
            cause = cause.__cause__  # what a constructor said, without jsonargparse's frame around it
        print(f"lightning-hyper {verb}: error: {cause} [{TRACEBACK}=1 shows where]", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"lightning-hyper {verb}: error: {error}", file=sys.stderr)
        return 1


def _run(verb: str, rest: list[str]) -> int:
    names, rest = _take(rest, "-c", "--config")
    wanted, rest = _take(rest, "--ckpt_path")
    given: dict[str, Any] = recipes.resolve(names) if names else {}
    source = Path(wanted[-1]) if wanted and wanted[-1] not in ("last", "best") else None
    if not names and source is not None:
        there = read_checkpoint(source)["recipe"]
        given = {key: value for key, value in there.items() if key not in ("run", "parent")}
    if not given and not {"-h", "--help"} & set(rest):
        raise RecipeError("no recipe: name one with -c (see `lightning-hyper recipes`), or give a --ckpt_path")
    rest = _nulls_into(given, rest)
    command = Command(
        Algorithm,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        parser_class=OneLineParser,
        args=[verb, *(["--config", yaml.safe_dump(given, sort_keys=False)] if given else []), *rest],
    )
    config = command.config[verb]
    if str(config.trainer.precision).startswith("16"):
        raise RecipeError(f"trainer.precision is {config.trainer.precision!r}; choose '32-true' or 'bf16-mixed'")
    if config.video < 0:
        raise RecipeError(f"video is {config.video}; it must be a number of frames, or 0 for none")
    stem = Path(names[-1]).stem if names else source.parents[1].name if source else "run"
    base = Path(config.root) / config.experiment
    if source is None and wanted:
        source = _newest(base, config.run or f"{stem}-seed{config.seed}", wanted[-1])
    checkpoint = read_checkpoint(source) if source else {}
    if checkpoint:
        _require_same(checkpoint["recipe"], command.recipe, verb)
    continuing = bool(checkpoint) and verb == "fit"
    if continuing:
        assert source is not None
        folder = source.resolve().parents[1]
    else:
        folder = base / _free_name(base, config.run, f"{stem}-seed{config.seed}" if verb == "fit" else f"{stem}-{verb}")
    return _execute(verb, command, folder, source, checkpoint if continuing else {})


def _execute(verb: str, command: Command, folder: Path, source: Path | None, continued: dict[str, Any]) -> int:
    config, made, recipe = command.config[verb], command.config_init[verb], command.recipe
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not torch.cuda.is_available():
        # Without a device every step of an optimiser looks for NVIDIA's library, a tenth of a small update; not so
        # where no device is visible.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    decision = choose_matmul(continued.get("matmul", config.matmul))
    rank_zero_info(decision.sentence)
    os.environ[RUN_FOLDER] = str(folder)  # the other ranks, started by Lightning with these arguments, write there too
    logger = MLflowLogger(
        config.root,
        config.experiment,
        folder.name,
        tracking_uri=config.tracking_uri,
        tags={
            **{key: str(recipe[key]) for key in ("paper", "method", "environment", "seed", "variant")},
            "git_commit": git_commit(),
            "hardware": hardware(),
            "matmul": decision.name,
            "kind": verb,
        },
        parent=config.parent,
        run_id=continued.get("run_id"),
    )
    logger.open()
    logger.clock = command.model.clock
    if verb == "fit" and config.weights is not None and not continued:
        command.model.weights = Path(config.weights)
    logger.log_hyperparams(recipe)
    logger.log_text(yaml.safe_dump(recipe, sort_keys=False), "recipe.yaml")
    stop = GracefulStop()
    trainer = Trainer(
        **{
            **made.trainer.as_dict(),
            "logger": logger,
            "default_root_dir": str(folder),
            "callbacks": [
                *(made.trainer.callbacks or []),
                FrameBudget(config.frames, config.stop_at_return),
                stop,
                ProgressBar(),
                RunState({"recipe": recipe, "matmul": decision.name}),
                made.checkpoint,
            ],
        }
    )
    try:
        getattr(trainer, verb)(command.model, datamodule=command.datamodule, ckpt_path=source, weights_only=True)
    except SystemExit:  # Lightning's way out of a second Ctrl-C
        if stop.signal is None:
            raise
    if stop.signal is not None:
        logger.finish("KILLED")
        rank_zero_info(f"Stopped at frame {command.model.clock.frames:,}; continue with --ckpt_path last")
        return 130
    if verb == "fit" and trainer.is_global_zero:
        _finish(trainer, command, folder, logger)
    return 0


def _finish(trainer: Trainer, command: Command, folder: Path, logger: MLflowLogger) -> None:
    """Leave behind what sweeps and readers look for: the summary, a picture, and the checkpoints as artifacts."""
    model = command.model
    picture = _picture(command, folder)
    if picture is not None:
        logger.log_artifact(picture, "pictures")
    summary: dict[str, float | None] = {"frames": model.clock.frames, "budget": model.clock.budget}
    summary |= {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("eval/")}
    for name in ("last", "best"):
        if (folder / "checkpoints" / f"{name}.ckpt").exists():
            logger.log_artifact(folder / "checkpoints" / f"{name}.ckpt", "checkpoints")
    logger.flush()
    (folder / "finished.json").write_text(json.dumps(summary))


def _picture(command: Command, folder: Path) -> Path | None:
    """What the trained policy does, drawn or filmed; None where there is no picture of it."""
    model, make_env = command.model, command.datamodule.make_env
    agent = Agent(copy.deepcopy(model.policy).cpu(), model.spaces, command.recipe)
    env = command.datamodule.env
    if isinstance(env, envs.GridNavi):
        from lightning_hyper.analysis.gridnavi import draw_trial

        draw_trial(agent, make_env(num_envs=1, device="cpu")).savefig(folder / "trial.png", dpi=120)
        return folder / "trial.png"
    frames = command.recipe["video"]
    if frames and isinstance(env, envs.MuJoCo | envs.Pendulum):
        from lightning_hyper.analysis.video import record

        return record(agent, make_env, folder / "episode.gif", frames=frames)
    return None


def _quieten() -> None:
    """Leave out what other packages say at every start, none of which a user can act on."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(
            lambda record: (
                not record.getMessage().startswith(("GPU available", "TPU available", "💡", "`weights_only`"))
            )
        )
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _take(arguments: list[str], *options: str) -> tuple[list[str], list[str]]:
    """Values of an option, given as `--key value` or `--key=value`, and the other arguments."""
    values, others, i = [], [], 0
    while i < len(arguments):
        key, equals, value = arguments[i].partition("=")
        if key in options and equals:
            values.append(value)
        elif arguments[i] in options:
            i += 1
            if i == len(arguments):
                raise RecipeError(f"{key} needs a value")
            values.append(arguments[i])
        else:
            others.append(arguments[i])
        i += 1
    return values, others


def _nulls_into(recipe: dict[str, Any], arguments: list[str]) -> list[str]:
    """Set to null in the recipe what `arguments` set to null; returns the other arguments.

    On the command line jsonargparse takes a null below a factory, such as `model.init_args.retriever`, for the text
    "None", which it then refuses.
    """
    for key in sorted({part.partition("=")[0] for part in arguments if re.match(r"--(model|data)\.", part)}):
        values, others = _take(arguments, key)
        *path, name = key.removeprefix("--").split(".")
        place: Any = recipe
        for step in path:
            place = place.get(step) if isinstance(place, dict) else None
        if values and values[-1] == "null" and isinstance(place, dict):
            place[name], arguments = None, others
    return arguments


def _newest(base: Path, run: str, name: str) -> Path:
    """The newest checkpoint called `name` among the runs of that name, numbered ones included."""
    pattern = re.compile(re.escape(run) + r"(-\d+)?$")
    found = [
        folder / "checkpoints" / f"{name}.ckpt"
        for folder in (base.iterdir() if base.is_dir() else [])
        if pattern.match(folder.name) and (folder / "checkpoints" / f"{name}.ckpt").exists()
    ]
    if not found:
        raise RecipeError(f"ckpt_path: there is no {name}.ckpt of a run {run!r} in {base}")
    return max(found, key=lambda path: path.stat().st_mtime)


def _free_name(base: Path, run: str | None, stem: str) -> str:
    if RUN_FOLDER in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[RUN_FOLDER]).name
    if run is not None:
        if (base / run / "checkpoints").exists():
            raise RecipeError(
                f"run: {base / run} has checkpoints already; continue it with --ckpt_path last, or rename"
            )
        return run
    taken = {path.name for path in base.iterdir()} if base.is_dir() else set()
    numbered = (f"{stem}-{k}" for k in itertools.count(2))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def _require_same(there: dict[str, Any], here: dict[str, Any], verb: str) -> None:
    """Refuse a checkpoint of another recipe, naming the keys that differ."""
    parts = ("model", "data") if verb == "fit" else ("model",)
    old, new = (_flat({part: recipe[part] for part in parts}) for recipe in (there, here))
    differing = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in FREE_ON_RESUME]
    if differing:
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differing[:5])
        raise RecipeError(f"ckpt_path: the checkpoint is of another recipe ({shown})")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, branch in tree.items() for k, v in _flat(branch, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
