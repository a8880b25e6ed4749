"""The command `lightning-hyper`; each verb imports what it needs when it is called, so that help is immediate."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from lightning_hyper import recipes
from lightning_hyper.folder import Root

VERBS = {
    "fit": "train a recipe, or resume it",
    "validate": "evaluate a checkpoint on the evaluation tasks",
    "test": "evaluate a checkpoint on the test tasks",
    "recipes": "list the shipped recipes; show or copy one",
    "sweep": "train recipes over seeds, several runs at a time",
    "report": "tables and learning curves from the runs of an experiment",
    "ui": "browse the runs with MLflow",
}
HELP = f"""usage: lightning-hyper VERB ...

Reinforcement learning in which how a network is conditioned on a context is one swappable part of a recipe.

verbs:
{chr(10).join(f"  {verb:9} {text}" for verb, text in VERBS.items())}

options:
  -h, --help     this text; `lightning-hyper VERB --help` explains one verb
  --version      the version

first steps:
  lightning-hyper recipes
  lightning-hyper fit -c recurrent/gridnavi_rnn_hn --seed 0
  lightning-hyper fit -c recurrent/gridnavi_rnn_hn --model.lr 3e-4 --print_config
  lightning-hyper ui

A fault of a recipe or command is said in one line; LIGHTNING_HYPER_TRACEBACK=1 shows where it was found.
"""
WIDTH = 118


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; gives 0, 1 for a failed run, 2 for a command at fault, or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    try:
        if verb == "--version":
            print(f"lightning-hyper {_version()}")
            return 0
        if verb in ("fit", "validate", "test"):
            # More threads than one slow small networks down; `threads` in a recipe asks for more. Before torch comes.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            from lightning_hyper.experiment import main as experiment

            return experiment([verb, *rest])
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(VERBS)}"
            return _fault(f"unknown verb {verb!r}; {meant}")
        return {"recipes": _recipes, "sweep": _sweep, "report": _report, "ui": _ui}[verb](rest)
    except recipes.RecipeError as error:
        return _fault(str(error), verb)
    except SystemExit as end:  # argparse's way to answer --help and faults
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def script() -> None:
    """Run the command line of this process and end with its exit code."""
    sys.exit(main())


def _fault(message: str, verb: str = "") -> int:
    print(f"lightning-hyper{' ' + verb if verb else ''}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return metadata.version("lightning-hyper")
    except metadata.PackageNotFoundError:
        return "(not installed)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser(verb: str, description: str) -> _Parser:
    return _Parser(f"lightning-hyper {verb}", description=description, allow_abbrev=False)


def seeds(text: str) -> list[int]:
    """Return the seeds of `0-9`, `0,3,5` or `0-2,7`, each once; raises ArgumentTypeError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"must be such as 0-9 or 0,3,5, not {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def varied(text: str) -> tuple[str, list[str]]:
    """Return key and values of `lr=1e-3,1e-4`; commas in brackets part nothing. Raises ArgumentTypeError."""
    key, _, values = text.lstrip("-").partition("=")
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if not key or not all(parts):
        raise argparse.ArgumentTypeError(f"must be KEY=V1,V2, such as model.init_args.lr=1e-3,1e-4, not {text!r}")
    return key, list(dict.fromkeys(parts))


def reference(text: str) -> tuple[str, float]:
    """Return label and height of `random=-5.2`; raises ArgumentTypeError."""
    label, _, value = text.rpartition("=")
    try:
        height = float(value)
    except ValueError:
        label, height = "", 0.0
    if not label:
        raise argparse.ArgumentTypeError(f"must be LABEL=NUMBER, such as random=-5.2, not {text!r}")
    return label, height


def port(text: str) -> int:
    """Return a port that a program can ask for; raises ArgumentTypeError."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, not {text!r}")
    return int(text)


def _recipes(rest: Sequence[str]) -> int:
    parser = _parser(
        "recipes", "List the shipped recipes, or those with some words; show one whole, or copy it to edit."
    )
    parser.usage = "%(prog)s [WORD ...] | show NAME | copy NAME [DEST]"
    if rest and rest[0] in ("show", "copy"):
        parser.add_argument("action", choices=("show", "copy"), help=argparse.SUPPRESS)
        parser.add_argument("name", metavar="NAME", help="name of a shipped recipe, or path of a YAML file")
        if rest[0] == "copy":
            parser.add_argument(
                "destination", metavar="DEST", nargs="?", help="file or folder; <end of NAME>.yaml here"
            )
        chosen = parser.parse_args(rest)
        if chosen.action == "show":
            print(recipes.show(chosen.name), end="")
        else:
            target = recipes.copy(chosen.name, chosen.destination)
            print(f"wrote {target}; train it with: lightning-hyper fit -c {target}")
        return 0
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="of a recipe's name, paper, method, environment or description, such as rnn_hn, 2309.14970 or GridNavi; "
        "several must all be there; what was measured is then told, too",
    )
    words = parser.parse_args(rest).words
    rows, layers = recipes.listing(words)
    if words:
        tables = [_table(recipes.Row._fields, rows)] if rows else []
        if layers:
            told = "Layers, to be trained together: lightning-hyper fit -c LAYER -c LAYER ...\n\n"
            tables.append(told + _table(("layer", "what it is"), list(layers.items())))
        print("\n".join(tables), end="")
    else:
        print(_table(("name", "method", "environment"), [(row.name, row.method, row.environment) for row in rows]))
        print(f"Besides, {len(layers)} layers, to be trained together. More of some, with what was measured:")
        print("lightning-hyper recipes WORD, such as rnn_hn, 2309.14970 or GridNavi")
    return 0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table in which the last column is wrapped, so that lines fit the usual wide terminal."""
    cells = [tuple(field.upper() for field in head), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head) - 1)]
    indent = sum(widths) + 2 * len(widths)
    # A name so long that little room is left: the result goes below it, not into a column of single words.
    narrow = indent > WIDTH - 30 and indent + max(len(row[-1]) for row in cells) > WIDTH
    lines = []
    for row in cells:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(row, widths, strict=False))
        hanging = " " * (4 if narrow else indent)
        measured = textwrap.wrap(row[-1], WIDTH - len(hanging)) or [""]
        if narrow:
            lines += [start, *(hanging + part for part in measured)]
        else:
            lines += [start + measured[0], *(hanging + part for part in measured[1:])]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _sweep(rest: Sequence[str]) -> int:
    parser = _parser(
        "sweep",
        "Train recipes over seeds in child processes. Called again: skips what is finished, resumes what was cut.",
    )
    parser.usage = "%(prog)s -c RECIPE [-c RECIPE ...] --seeds 0-9 [options] [-- overrides passed on to fit]"
    parser.add_argument(
        "-c",
        "--config",
        metavar="RECIPE",
        action="append",
        required=True,
        help="a name or path, or several layers as one, A+B; repeatable, each trained on its own",
    )
    parser.add_argument("--seeds", type=seeds, metavar="SEEDS", required=True, help="such as 0-9 or 0,3,5")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (the first recipe's)")
    parser.add_argument("--root", default="runs", help="folder of everything that is written (runs)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server (the database under the root)")
    parser.add_argument(
        "--vary",
        type=varied,
        metavar="KEY=V1,V2",
        action="append",
        default=[],
        help="also train each recipe with these values of a key; repeatable, all combinations are run",
    )
    mine, overrides = list(rest), []
    if "--" in mine:
        split = mine.index("--")
        mine, overrides = mine[:split], mine[split + 1 :]
    chosen = parser.parse_args(mine)
    if len(dict(chosen.vary)) < len(chosen.vary):
        parser.error("argument --vary: a key is given twice; give all its values at once")
    from lightning_hyper import sweep

    try:
        return sweep.sweep(
            chosen.config,
            chosen.seeds,
            chosen.jobs,
            chosen.experiment,
            chosen.root,
            vary=dict(chosen.vary),
            overrides=overrides,
            tracking_uri=chosen.tracking_uri,
        )
    except sweep.SweepError as error:
        return _fault(str(error), "sweep")


def _report(rest: Sequence[str]) -> int:
    parser = _parser(
        "report", "Make a table and a learning-curve picture for each environment from an experiment's runs."
    )
    parser.add_argument("--experiment", metavar="NAME", required=True, help="MLflow experiment")
    parser.add_argument("--root", default="runs", help="folder of the runs (runs)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server (the database under the root)")
    parser.add_argument("--metric", default="eval/return", help="what is compared (eval/return)")
    parser.add_argument("--out", metavar="FOLDER", help="where it is written (<root>/<experiment>/report)")
    parser.add_argument(
        "--reference",
        type=reference,
        metavar="LABEL=VALUE",
        action="append",
        default=[],
        help="a horizontal line, such as random=-5.2; repeatable",
    )
    parser.add_argument("--against", metavar="METHOD", help="give every method's difference to this one, too")
    parser.add_argument("--unfinished", action="store_true", help="count runs that are not finished, too")
    chosen = parser.parse_args(rest)
    from lightning_hyper.analysis.report import ReportError, report

    try:
        made = report(
            chosen.experiment,
            chosen.root,
            tracking_uri=chosen.tracking_uri,
            metric=chosen.metric,
            out=chosen.out,
            references=dict(chosen.reference),
            against=chosen.against,
            unfinished=chosen.unfinished,
        )
    except ReportError as error:
        return _fault(str(error), "report")
    print(made.text)
    return 0


def _ui(rest: Sequence[str]) -> int:
    parser = _parser("ui", "Serve MLflow's pages on the runs, and print a link to the run table of each experiment.")
    parser.add_argument("--root", default="runs", help="folder of the runs (runs)")
    parser.add_argument("--port", type=port, default=5000, help="port on 127.0.0.1 (5000)")
    chosen = parser.parse_args(rest)
    from lightning_hyper.ui import UIError, serve

    try:
        serve(Root(Path(chosen.root).absolute()), chosen.port)
    except UIError as error:
        return _fault(str(error), "ui")
    return 0
