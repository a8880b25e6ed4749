"""Everything that is run on this project; all sessions share one environment, because it weighs 6 GB."""

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
ENVIRONMENT = Path(__file__).parent / ".nox" / "shared"
PYTHON = str(ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python")
WANTED = ("pyproject.toml", ".ci/constraints.txt")


def run(session: nox.Session, *command: str) -> None:
    """A command in the shared environment, on one thread unless OMP_NUM_THREADS says otherwise."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    session.run(PYTHON, *command, external=True, env={"OMP_NUM_THREADS": threads})


def shared(session: nox.Session, extras: str = "dev") -> None:
    """Make the environment, or bring it up to date where what it is made from has changed."""
    done = ENVIRONMENT / f"installed-{extras}"
    stamp = hashlib.sha256(b"".join(Path(name).read_bytes() for name in WANTED)).hexdigest()
    if done.exists() and done.read_text() == stamp:
        return
    if not Path(PYTHON).exists():
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    run(session, "-m", "pip", "install", "-q", "-e", f".[{extras}]", "-c", ".ci/constraints.txt")
    done.write_text(stamp)


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Train RNN and RNN+HN on GridNavi, print the table, write the pictures."""
    shared(session)
    run(session, "-m", "lightning_hyper.quickstart", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests, a few at a time; what needs a GPU skips without one."""
    shared(session)
    together = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    run(session, "-m", "pytest", *(session.posargs or ["-q", "--durations=10", *together]))


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    shared(session)
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy, strict on the package."""
    shared(session)
    run(session, "-m", "mypy")


@nox.session(venv_backend="none")
def recipes(session: nox.Session) -> None:
    """Every shipped recipe parses, one of each method trains; then the matrix of contexts, conditioning, algorithms and
    environments: trained two batches, or refused, with the sentence."""
    shared(session)
    run(session, "-m", "pytest", "-q", "tests/recipes", *session.posargs)
    run(session, "tests/recipes/matrix.py")


@nox.session(venv_backend="none")
def campaign(session: nox.Session) -> None:
    """Killed runs, spoilt recipes and hostile checkpoints, twenty times as many as in the tests."""
    shared(session)
    files = ("tests/resume", "tests/test_mistakes.py", "tests/test_attacks.py", "tests/test_checkpoint_file.py")
    run(session, "-m", "pytest", "-q", *(session.posargs or ["--campaign", "20", "-n", "2"]), *files)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Speed, as ratios measured in one run; on a GPU too where there is one."""
    shared(session, "dev,bench")
    scripts = (
        "hypernetwork_layer.py",
        "gridnavi_training.py",
        "mujoco_stepping.py",
        "minigrid_stepping.py",
        "maze_stepping.py",
        "minigrid_training.py",
        "off_policy_training.py",
        "replay_memory.py",
    )
    for script in scripts:
        run(session, f"tests/bench/{script}", *session.posargs)
