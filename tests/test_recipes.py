"""Recipes are found, layered, merged, listed and copied; every fault is one sentence that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_hyper import recipes
from lightning_hyper.recipes import RecipeError


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(recipes, "folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def merged(tmp_path: Path, *texts: str) -> dict[str, object]:
    return recipes.resolve([str(write(tmp_path, f"part{i}", text)) for i, text in enumerate(texts)])


def test_later_recipes_win_key_by_key(tmp_path: Path) -> None:
    result = merged(tmp_path, "model: {lr: 1, gamma: 2}\nframes: 10", "model: {lr: 3}")
    assert result == {"model": {"lr": 3, "gamma": 2}, "frames": 10}


def test_another_class_takes_nothing_of_the_earlier_arguments(tmp_path: Path) -> None:
    earlier = "actor: {class_path: Concat, init_args: {hidden: [8], out: 1}}"
    later = "actor: {class_path: Hyper, init_args: {init: x}}"
    assert merged(tmp_path, earlier, later) == {"actor": {"class_path": "Hyper", "init_args": {"init": "x"}}}


@pytest.mark.parametrize("later", ["{init_args: {out: 2}}", "{class_path: Concat, init_args: {out: 2}}"])
def test_the_same_class_keeps_its_other_arguments(tmp_path: Path, later: str) -> None:
    result = merged(tmp_path, "actor: {class_path: Concat, init_args: {hidden: [8], out: 1}}", f"actor: {later}")
    assert result == {"actor": {"class_path": "Concat", "init_args": {"hidden": [8], "out": 2}}}


def test_a_list_replaces_and_a_key_with_plus_appends(tmp_path: Path) -> None:
    assert merged(tmp_path, "callbacks: [a]", "callbacks: [b]") == {"callbacks": ["b"]}
    assert merged(tmp_path, "callbacks: [a]", "callbacks+: [b]", "callbacks+: [c]") == {"callbacks": ["a", "b", "c"]}


def test_appending_to_nothing_makes_the_list(tmp_path: Path) -> None:
    assert merged(tmp_path, "trainer: {callbacks+: [b]}") == {"trainer": {"callbacks": ["b"]}}


def test_appending_what_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"part0\.yaml: key `trainer\.callbacks\+`.*'b'"):
        merged(tmp_path, "trainer: {callbacks+: b}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3_000_000", 3_000_000),
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        ("3e6", 3e6),
        ("1.0e-3", 1e-3),
        ("'1e-4'", "1e-4"),
        ("run1e4", "run1e4"),
        ("1e", "1e"),
    ],
)
def test_numbers_come_out_as_numbers(tmp_path: Path, text: str, value: object) -> None:
    found = merged(tmp_path, f"x: {text}")["x"]
    assert found == value
    assert type(found) is type(value)


def test_layers_lie_below_and_in_order(shipped: Path) -> None:
    write(shipped, "paper/_base", "lr: 1\ngamma: 1\nframes: 1")
    write(shipped, "paper/_env", "layers: [_base]\ngamma: 2\nframes: 2")
    write(shipped, "paper/_fast", "layers: [paper/_base]\nlr: 3")
    write(shipped, "paper/method", "layers: [paper/_env, paper/_fast]\nframes: 4")
    # The base is named by both layers and counts once: it does not undo _env's gamma.
    assert recipes.resolve(["paper/method"]) == {"lr": 3, "gamma": 2, "frames": 4}


def test_a_second_whole_recipe_brings_its_own_layers(shipped: Path) -> None:
    write(shipped, "_base", "lr: 1")
    write(shipped, "a", "layers: [_base]\nlr: 2")
    write(shipped, "b", "layers: [_base]")
    assert recipes.resolve(["a", "b"]) == {"lr": 1}


def test_resolving_twice_gives_results_of_their_own(shipped: Path) -> None:
    write(shipped, "a", "callbacks: [{x: 1}]\nmodel: {lr: 1}")
    first = recipes.resolve(["a"])
    first["callbacks"][0]["x"] = first["model"]["lr"] = 5
    assert recipes.resolve(["a"]) == {"callbacks": [{"x": 1}], "model": {"lr": 1}}


def test_layers_in_a_circle_are_refused(shipped: Path) -> None:
    write(shipped, "a", "layers: [b]")
    write(shipped, "b", "layers: [a]")
    with pytest.raises(RecipeError, match="circle: a -> b -> a"):
        recipes.resolve(["a"])


def test_a_missing_layer_is_named_with_the_recipe_that_asks_for_it(shipped: Path) -> None:
    path = write(shipped, "a", "layers: [paper/_gone]")
    with pytest.raises(RecipeError, match="_gone") as error:
        recipes.resolve(["a"])
    assert str(path) in str(error.value)


def test_an_unknown_name_suggests_the_nearest(shipped: Path) -> None:
    write(shipped, "recurrent/gridnavi_rnn_hn", "x: 1")
    write(shipped, "recurrent/_gridnavi", "x: 1")
    for wrong in ("recurrent/gridnavi_rnn_nh", "gridnavi_rnn_hn"):
        with pytest.raises(RecipeError, match=r"did you mean recurrent/gridnavi_rnn_hn\?") as error:
            recipes.resolve([wrong])
        assert "lightning-hyper recipes" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {lr: 1\nx: [", "line 2"),
        ("lr: 1\ngamma: 2\nlr: 3", "line 3, column 1: key `lr` is given twice"),
        ("model: {init_args: {lr: 1, lr: 2}}", "`lr` is given twice"),
        ("[1, 2]", "must be a mapping"),
        ("layers: _base", "`layers` must be a list"),
        ("paper: 2309.10", "quotes"),
        ("x: !!python/object:os.system {}", "line 1"),
    ],
)
def test_a_faulty_file_gives_one_line_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        merged(tmp_path, text)
    assert said in str(error.value)
    assert "part0.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_a_recipe_error(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.resolve([str(path)])


def test_merge_keys_and_anchors_of_yaml_work(tmp_path: Path) -> None:
    result = merged(tmp_path, "a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}")
    assert result == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}


HEADER = """\
# paper/method   A method on an environment
# run:      lightning-hyper fit -c paper/method
# measured: trial return 33.1 [32.5, 33.6],
#           5 seeds, 3M frames
# note:     something else
"""


def test_the_listing_leaves_out_layers_and_gathers_the_measured_lines(shipped: Path) -> None:
    write(shipped, "paper/_base", 'paper: "2309.14970"\nenvironment: GridNavi')
    write(shipped, "_drafts/method", "x: 1")
    write(shipped, "paper/method", HEADER + "layers: [paper/_base]\nmethod: RNN+HN\n")
    write(shipped, "paper/other", "# paper/other\nlayers: [paper/_base]\nmethod: RNN\n")
    assert recipes.listing() == [
        (
            "paper/method",
            "2309.14970",
            "RNN+HN",
            "GridNavi",
            "trial return 33.1 [32.5, 33.6], 5 seeds, 3M frames",
        ),
        ("paper/other", "2309.14970", "RNN", "GridNavi", "not measured yet"),
    ]


def test_a_copy_is_whole_and_equal_to_the_recipe(shipped: Path, tmp_path: Path) -> None:
    write(
        shipped, "paper/_base", "frames: 3_000_000\nlr: 1e-5\nname: '1e-4'\nhidden: &h [256, 128]\nagain: *h\nsize: 12"
    )
    write(shipped, "paper/method", HEADER + "layers: [paper/_base]\nsize: 13\ncallbacks+: [a]\n")
    target = recipes.copy("paper/method")
    assert target == Path("method.yaml")
    text = target.read_text()
    assert text == recipes.show("paper/method")
    assert text.startswith(HEADER)
    assert "layers" not in text
    assert recipes.resolve(["method.yaml"]) == recipes.resolve(["paper/method"])
    assert recipes.resolve(["method.yaml"])["lr"] == 1e-5
    assert yaml.safe_load(text)["frames"] == 3_000_000  # plain YAML readers take it, too


def test_a_copy_overwrites_nothing(shipped: Path, tmp_path: Path) -> None:
    write(shipped, "paper/method", "x: 1")
    (tmp_path / "method.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"method\.yaml exists"):
        recipes.copy("paper/method")
    assert (tmp_path / "method.yaml").read_text() == "mine"
    assert recipes.copy("paper/method", tmp_path / "new" / "mine.yaml").read_text() == "x: 1\n"


def test_an_installed_wheel_is_preferred_to_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_hyper").mkdir()
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "lightning_hyper" / "recipes.py"))
    with pytest.raises(RecipeError, match="no recipes are shipped"):
        recipes.folder()
    (tmp_path / "recipes").mkdir()
    assert recipes.folder() == tmp_path / "recipes"
    (tmp_path / "lightning_hyper" / "_recipes").mkdir()
    assert recipes.folder() == tmp_path / "lightning_hyper" / "_recipes"
