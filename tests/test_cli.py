"""The command answers at once, hands verbs on, and tells faults in one line with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lightning_hyper import cli, recipes
from lightning_hyper.recipes import Row

HEAVY = ("torch", "lightning", "mlflow", "numpy", "matplotlib", "torchrl", "jsonargparse")


@pytest.mark.parametrize("arguments", [None, ["--help"], ["--version"], ["recipes"], ["sweep", "--help"], ["nonsense"]])
def test_what_must_answer_at_once_imports_nothing_heavy(arguments: list[str] | None) -> None:
    call = "" if arguments is None else f"from lightning_hyper.cli import main; main({arguments!r})\n"
    code = (
        f"import json, sys\nimport lightning_hyper\n{call}print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_the_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "lightning_hyper", "fitt"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "lightning-hyper: error: unknown verb 'fitt'; did you mean 'fit'?\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "recipes", "sweep", "report", "ui"):
        assert f"\n  {verb} " in said
    assert cli.main([]) == 2


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_training_verbs_are_handed_on_with_their_exit_code(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    experiment: Any = types.ModuleType("lightning_hyper.experiment")
    experiment.main = lambda argv: got.append(argv) or 130
    monkeypatch.setitem(sys.modules, "lightning_hyper.experiment", experiment)
    assert cli.main([verb, "-c", "x", "--seed", "1"]) == 130
    assert got == [[verb, "-c", "x", "--seed", "1"]]


def test_training_has_one_thread_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment: Any = types.ModuleType("lightning_hyper.experiment")
    experiment.main = lambda argv: 0
    monkeypatch.setitem(sys.modules, "lightning_hyper.experiment", experiment)
    for given, expected in (("3", "3"), (None, "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert cli.main(["fit", "-c", "x"]) == 0
        assert os.environ["OMP_NUM_THREADS"] == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


ROWS = [
    Row("recurrent/gridnavi_rnn_hn", "2309.14970", "RNN+HN", "GridNavi", "word " * 40 + "end"),
    Row("icml/" + "long" * 20, "ICML 2021", "SAC", "Ant", "33.1"),
]


def test_the_listing_is_a_line_a_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipes, "listing", lambda words: (ROWS, {"a/layer": "Seven tasks.", "b": ""}))
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["NAME", "METHOD", "ENVIRONMENT"],
        ["recurrent/gridnavi_rnn_hn", "RNN+HN", "GridNavi"],
        [ROWS[1].name, "SAC", "Ant"],
    ]
    assert "2 layers" in lines[4]


def test_with_words_the_listing_tells_what_was_measured_and_fits_120_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    for shown in (ROWS, ROWS[:1]):
        monkeypatch.setattr(recipes, "listing", lambda words, shown=shown: asked.append(words) or (shown, {}))
        assert cli.main(["recipes", "rnn_hn", "GridNavi"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 120
        assert " ".join(lines).count("word") == 40
    assert asked == [["rnn_hn", "GridNavi"]] * 2
    assert lines[0].index("MEASURED") == lines[1].index("word") == lines[2].index("word")


def test_layers_are_listed_after_the_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {"retrieval/seven": "Seven tasks.", "mppo": "One network."}
    for rows, above in (([Row("a", "", "", "", "1")], 3), ([], 0)):
        monkeypatch.setattr(recipes, "listing", lambda words, rows=rows: (rows, layers))
        assert cli.main(["recipes", "x"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[above:] == [
            "Layers, to be trained together: lightning-hyper fit -c LAYER -c LAYER ...",
            "",
            "LAYER            WHAT IT IS",
            "retrieval/seven  Seven tasks.",
            "mppo             One network.",
        ]


def test_show_and_copy_write_the_whole_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "_base.yaml").write_text("frames: 100")
    (tmp_path / "mine.yaml").write_text("# mine\nlayers: [_base]\nlr: 1e-4")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "show", "mine.yaml"]) == 0
    assert capsys.readouterr().out == "# mine\nframes: 100\nlr: 0.0001\n"
    assert cli.main(["recipes", "copy", "mine.yaml", "other.yaml"]) == 0
    copied = "# mine\n# run: lightning-hyper fit -c other.yaml\nframes: 100\nlr: 0.0001\n"
    assert (tmp_path / "other.yaml").read_text() == copied
    assert cli.main(["recipes", "copy", "mine.yaml"]) == 2
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipes", "show", "nope"], "unknown recipe 'nope'"),
        (["recipes", "shw"], "did you mean 'show'?"),
        (["recipes", "show"], "the following arguments are required: NAME"),
        (["recipes", "rnn_nh"], "did you mean 'rnn_hn'?"),
        (["sweep", "-c", "nope", "--seeds", "0"], "unknown recipe 'nope'"),
        (["sweep", "-c", "x", "--seeds", "9-0"], "argument --seeds: must be such as 0-9 or 0,3,5, not '9-0'"),
        (["sweep", "-c", "x", "--seeds", "0", "--vary", "lr"], "argument --vary: must be KEY=V1,V2"),
        (["sweep", "-c", "x", "--seeds", "0", "--vary", "a=1", "--vary", "a=2"], "a key is given twice"),
        (["sweep", "-c", "x", "--seeds", "0", "--frame", "5"], "unrecognized arguments: --frame 5"),
        (["report", "--experiment", "e", "--reference", "random"], "argument --reference: must be LABEL=NUMBER"),
        (["report", "--experiment", "e", "--root", "gone"], "gone/mlflow.db does not exist"),
        (["ui", "--root", "gone"], "gone/mlflow.db does not exist"),
        (["ui", "--port", "70000"], "argument --port: must be a number from 1 to 65535, not '70000'"),
        (["ui", "--port", "x"], "argument --port: must be a number from 1 to 65535, not 'x'"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_seeds_and_varied_values_are_read() -> None:
    assert cli.seeds("0-3") == [0, 1, 2, 3]
    assert cli.seeds("0,3,5-6,3") == [0, 3, 5, 6]
    assert cli.varied("--model.lr=1e-3,1e-4") == ("model.lr", ["1e-3", "1e-4"])
    assert cli.varied("hidden=[64,64],[256]") == ("hidden", ["[64,64]", "[256]"])
    nested = "{class_path: MLPTrunk, init_args: {widths: [64, 64]}}"
    assert cli.varied(f"trunk=null,{nested}") == ("trunk", ["null", nested])


def test_a_sweep_passes_on_what_follows_the_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}
    monkeypatch.setattr("lightning_hyper.sweep.sweep", lambda *given, **named: got.update(named, given=given) or 1)
    words = ["sweep", "-c", "a", "-c", "b", "--seeds", "0,2", "--vary", "lr=1,2", "--", "--frames", "100", "--seeds"]
    assert cli.main(words) == 1
    assert got["given"] == (["a", "b"], [0, 2], 2, None, "runs")
    assert got["vary"] == {"lr": ["1", "2"]}
    assert got["overrides"] == ["--frames", "100", "--seeds"]
