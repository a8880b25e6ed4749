"""Everything that is run on this project; all sessions share one environment, because it weighs 6 GB."""

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True
CONSTRAINTS = ".ci/constraints.txt"
THREADS = {"OMP_NUM_THREADS": "1"}


def shared(function):
    return nox.session(venv_location=".nox/shared", reuse_venv=True)(function)


def install(session: nox.Session, *extras: str) -> None:
    """The package, editable, with its pinned dependencies; a moment when they are there already."""
    wanted = ",".join(("dev", *extras))
    session.install("-q", "-e", f".[{wanted}]", "-c", CONSTRAINTS)


@shared
def quickstart(session: nox.Session) -> None:
    """Train RNN and RNN+HN on GridNavi, print the table, write the pictures."""
    install(session)
    session.run("python", "-m", "lightning_hyper.quickstart", *session.posargs, env=THREADS)


@shared
def tests(session: nox.Session) -> None:
    """All tests; what needs a GPU skips without one."""
    install(session)
    session.run("pytest", *(session.posargs or ["-q", "--durations=10"]), env=THREADS)


@shared
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@shared
def types(session: nox.Session) -> None:
    """Mypy, strict on the package."""
    install(session)
    session.run("mypy")


@shared
def recipes(session: nox.Session) -> None:
    """Every shipped recipe parses and trains two batches."""
    install(session)
    session.run("pytest", "-q", "tests/recipes", *session.posargs, env=THREADS)


@shared
def bench(session: nox.Session) -> None:
    """Speed, as ratios measured in one run; on a GPU too where there is one."""
    install(session, "bench")
    for script in sorted(Path("tests/bench").glob("*.py")):
        session.run("python", str(script), *session.posargs, env={**THREADS, **os.environ})
