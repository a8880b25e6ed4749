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


def test_the_name_of_a_class_alone_is_short_for_its_mapping(tmp_path: Path) -> None:
    alone, later = "encoder: GRU", "encoder: {init_args: {hidden: 8}}"
    whole = {"encoder": {"class_path": "GRU", "init_args": {"hidden": 8}}}
    assert merged(tmp_path, alone, later) == whole
    assert merged(tmp_path, "encoder: {class_path: nn.GRU, init_args: {hidden: 8}}", alone) == whole
    assert merged(tmp_path, "encoder: {class_path: LSTM, init_args: {hidden: 8}}", alone) == {
        "encoder": {"class_path": "GRU"}
    }


@pytest.mark.parametrize("path", ["a.Concat", "b.Concat"])
def test_classes_of_one_name_in_two_modules_are_two(tmp_path: Path, path: str) -> None:
    earlier = "actor: {class_path: a.Concat, init_args: {out: 1}}"
    kept = {"init_args": {"out": 1}} if path == "a.Concat" else {}
    assert merged(tmp_path, earlier, f"actor: {{class_path: {path}}}") == {"actor": {"class_path": path, **kept}}


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


@pytest.mark.parametrize("named", [["a", "b"], ["a+b"]])
def test_recipes_given_together_are_layers_of_one(shipped: Path, named: list[str]) -> None:
    write(shipped, "_base", "lr: 1\ngamma: 1")
    write(shipped, "a", "layers: [_base]\nlr: 2")
    write(shipped, "b", "layers: [_base]\ngamma: 3")
    assert recipes.resolve(named) == {"lr": 2, "gamma": 3}
    assert recipes.stem(named) == "a-b"


def test_a_file_whose_name_has_a_plus_is_one_file(shipped: Path) -> None:
    write(shipped, "a", "x: 1")
    write(shipped, "a+b", "x: 2")
    assert recipes.resolve(["a+b"]) == {"x": 2}
    assert recipes.stem(["sub/a+b"]) == "a-b"
    assert recipes.stem(["a+b"]) == "a+b"


def test_a_task_and_a_method_make_a_recipe_in_either_order(shipped: Path) -> None:
    write(shipped, "seven", "experiment: seven\ndata: {init_args: {env: {init_args: {tasks: seven}}}}")
    write(
        shipped,
        "mppo",
        "method: MPPO\n"
        "data: {class_path: Rollouts, init_args: {env: {class_path: MiniGrid, init_args: {num_envs: 60}}}}",
    )
    env = {"class_path": "MiniGrid", "init_args": {"tasks": "seven", "num_envs": 60}}
    expected = {"experiment": "seven", "method": "MPPO", "data": {"class_path": "Rollouts", "init_args": {"env": env}}}
    assert recipes.resolve(["seven", "mppo"]) == recipes.resolve(["mppo", "seven"]) == expected
    write(shipped, "mine", "method: mine")
    assert recipes.resolve(["seven", "mppo", "mine"])["method"] == "mine"


def test_an_old_name_is_what_it_is_now_and_that_is_said_once(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(shipped, "retrieval/seven", "tasks: 7")
    write(shipped, "retrieval/mppo", "method: MPPO")
    write(shipped, "renamed", "retrieval/of_old: [retrieval/seven, retrieval/mppo]")
    for _ in range(2):
        assert recipes.resolve(["retrieval/of_old"]) == {"tasks": 7, "method": "MPPO"}
    said = "recipe retrieval/of_old is now called: -c retrieval/seven -c retrieval/mppo\n"
    assert capsys.readouterr().err == said
    write(shipped, "mine", "layers: [retrieval/of_old]\ntasks: 8")
    assert recipes.resolve(["mine"]) == {"tasks": 8, "method": "MPPO"}
    assert recipes.names() == ["mine", "retrieval/mppo", "retrieval/seven"]


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


def test_the_listing_gathers_the_measured_lines_of_whole_recipes(shipped: Path) -> None:
    write(shipped, "paper/_base", 'paper: "2309.14970"\nenvironment: GridNavi\ndata: Rollouts')
    write(shipped, "_drafts/method", "x: 1")
    write(shipped, "paper/method", HEADER + "layers: [paper/_base]\nmethod: RNN+HN\nmodel: PPO")
    write(shipped, "paper/other", "# paper/other\nlayers: [paper/_base]\nmethod: RNN\nmodel: {class_path: PPO}")
    write(shipped, "paper/layer", "layers: [paper/_base]")
    rows, layers = recipes.listing()
    assert layers == {"paper/layer": ""}
    assert rows == [
        (
            "paper/method",
            "2309.14970",
            "RNN+HN",
            "GridNavi",
            "trial return 33.1 [32.5, 33.6], 5 seeds, 3M frames",
        ),
        ("paper/other", "2309.14970", "RNN", "GridNavi", "not measured yet"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "model: {class_path: PPO}",
        "data: Rollouts",
        "data: Rollouts\nmodel: {init_args: {lr: 1}}",
        "data: Rollouts\nmodel: {class_path: PPO, init_args: {actor: {init_args: {hidden: [8]}}}}",
        "data: Rollouts\nmodel: PPO\ntrainer: {callbacks: [{init_args: {every: 1}}]}",
    ],
)
def test_what_lacks_a_class_is_a_layer_and_told_by_its_header(shipped: Path, content: str) -> None:
    header = "# paper/part   Seven tasks;\n#     add a method.\n# run: lightning-hyper fit\n# note: slow\n"
    write(shipped, "paper/part", header + content)
    assert recipes.listing() == ([], {"paper/part": "Seven tasks; add a method."})


def test_words_choose_recipes_by_all_that_the_listing_tells_of_them(shipped: Path) -> None:
    whole = "data: Rollouts\nmodel: PPO\n"
    write(shipped, "paper/navi_hn", f'{whole}paper: "2309.14970"\nmethod: RNN+HN\nenvironment: GridNavi')
    write(shipped, "paper/navi_s", f'{whole}paper: "2309.14970"\nmethod: RNN+S\nenvironment: GridNavi')
    write(shipped, "paper/part", "# paper/part   Seven tasks.\nx: 1")
    write(shipped, "gym/navi", f"{whole}environment: CartPole")

    def found(*words: str) -> list[str]:
        rows, layers = recipes.listing(words)
        return [*(row.name for row in rows), *layers]

    assert found() == ["gym/navi", "paper/navi_hn", "paper/navi_s", "paper/part"]
    assert found("navi_S") == ["paper/navi_s"]
    assert found("2309.14970") == ["paper/navi_hn", "paper/navi_s", "paper/part"]  # of a layer, that of its folder
    assert found("rnn+hn") == ["paper/navi_hn"]
    assert found("gridnavi") == ["paper/navi_hn", "paper/navi_s"]
    assert found("seven") == ["paper/part"]
    assert found("navi", "cartpole") == ["gym/navi"]
    for words, said in (
        (["nav_hn"], r"no recipe has 'nav_hn' in .*; did you mean 'navi_hn'\?"),
        (["GridNvai"], r"did you mean 'gridnavi'\?"),
        (["shw"], r"did you mean 'show'\?"),
        (["qqqqqq"], "`lightning-hyper recipes` lists what ships"),
        (["hn", "cartpole"], "no recipe has all of 'hn', 'cartpole'; each alone is in some"),
    ):
        with pytest.raises(RecipeError, match=said):
            recipes.listing(words)


def test_a_copy_is_whole_and_equal_to_the_recipe(shipped: Path, tmp_path: Path) -> None:
    write(
        shipped, "paper/_base", "frames: 3_000_000\nlr: 1e-5\nname: '1e-4'\nhidden: &h [256, 128]\nagain: *h\nsize: 12"
    )
    write(shipped, "paper/method", HEADER + "layers: [paper/_base]\nsize: 13\ncallbacks+: [a]\n")
    target = recipes.copy("paper/method")
    assert target == Path("method.yaml")
    text = target.read_text()
    # What was measured is not of the recipe that the copy becomes, and what was run was not the copy.
    assert text.startswith(
        "# paper/method   A method on an environment\n# note:     something else\n"
        "# run: lightning-hyper fit -c method.yaml\nframes: 3_000_000\n"
    )
    assert recipes.show("paper/method").startswith(HEADER)
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
    assert recipes.copy("paper/method", tmp_path / "new" / "mine.yaml").read_text().endswith("\nx: 1\n")


def test_an_installed_wheel_is_preferred_to_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_hyper").mkdir()
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "lightning_hyper" / "recipes.py"))
    with pytest.raises(RecipeError, match="no recipes are shipped"):
        recipes.folder()
    (tmp_path / "recipes").mkdir()
    assert recipes.folder() == tmp_path / "recipes"
    (tmp_path / "lightning_hyper" / "_recipes").mkdir()
    assert recipes.folder() == tmp_path / "lightning_hyper" / "_recipes"


RECIPE = {
    "model": {
        "class_path": "PPO",
        "init_args": {"lr": 0.1, "encoder": "GRU", "actor": {"class_path": "Hyper", "init_args": {"hidden": [8]}}},
    },
    "data": {"class_path": "Rollouts", "init_args": {"env": {"class_path": "Trials", "init_args": {"env": "Grid"}}}},
    "trainer": {"devices": 1, "callbacks": [{"class_path": "Attention", "init_args": {"every": 1}}, "Video"]},
    "run": "a",
}


def place(recipe: object, *path: object) -> object:
    for step in path:
        recipe = recipe[step]  # type: ignore[index]
    return recipe


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--model.lr", "1e-4"], ("model", "init_args", "lr"), 1e-4),
        (["--model.lr=1e-4"], ("model", "init_args", "lr"), 1e-4),
        (["--model.init_args.lr", "-2"], ("model", "init_args", "lr"), -2),
        (["--model.new", "true"], ("model", "init_args", "new"), True),
        (["--model.actor.hidden", "null"], ("model", "init_args", "actor", "init_args", "hidden"), None),
        (["--model.actor", "null"], ("model", "init_args", "actor"), None),
        (["--model.actor.hidden", "[4, 4]"], ("model", "init_args", "actor", "init_args", "hidden"), [4, 4]),
        (["--model.actor.hidden+=4"], ("model", "init_args", "actor", "init_args", "hidden"), [8, 4]),
        (["--model.actor.hidden+=[4, 2]"], ("model", "init_args", "actor", "init_args", "hidden"), [8, 4, 2]),
        (["--model.actor", "Concat"], ("model", "init_args", "actor"), {"class_path": "Concat"}),
        (["--model.actor", "Hyper"], ("model", "init_args", "actor", "init_args"), {"hidden": [8]}),
        (
            ["--model.actor", "{class_path: Hyper, init_args: {gain: 1}}"],
            ("model", "init_args", "actor", "init_args"),
            {"hidden": [8], "gain": 1},
        ),
        (
            ["--model.encoder.hidden", "3"],
            ("model", "init_args", "encoder"),
            {"class_path": "GRU", "init_args": {"hidden": 3}},
        ),
        (["--model.loss.clip", "0.1"], ("model", "init_args", "loss"), {"clip": 0.1}),
        (
            ["--data.env.env.num_envs", "8"],
            ("data", "init_args", "env", "init_args", "env"),
            {"class_path": "Grid", "init_args": {"num_envs": 8}},
        ),
        (["--model", "TD3"], ("model",), {"class_path": "TD3"}),
        (["--model", "TD3", "--model.lr", "1"], ("model",), {"class_path": "TD3", "init_args": {"lr": 1}}),
        (["--trainer.devices", "2"], ("trainer", "devices"), 2),
        (["--trainer.max_steps=5"], ("trainer", "max_steps"), 5),
        (
            ["--trainer.callbacks+=Bar", "--trainer.callbacks.every", "9"],
            ("trainer", "callbacks", 2),
            {"class_path": "Bar", "init_args": {"every": 9}},
        ),
        (["--trainer.callbacks+={class_path: Bar}"], ("trainer", "callbacks", 2), {"class_path": "Bar"}),
        (
            ["--trainer.callbacks.0.every", "9"],
            ("trainer", "callbacks", 0),
            {"class_path": "Attention", "init_args": {"every": 9}},
        ),
        (["--trainer.callbacks", "[]"], ("trainer", "callbacks"), []),
        (["--checkpoint.every", "5"], ("checkpoint", "every"), 5),
        (["--run", "3"], ("run",), "3"),
        (["--run", "1e-4"], ("run",), "1e-4"),
        (["--run", "null"], ("run",), None),
        (["--paper", "2309.10"], ("paper",), "2309.10"),
        (["--method="], ("method",), ""),
        (["--variant", "lr=1, gamma: 2"], ("variant",), "lr=1, gamma: 2"),
        (["--frames", "3_000"], ("frames",), 3000),
        (["--frames", "1", "--frames", "2"], ("frames",), 2),
    ],
)
def test_an_option_overrides_the_place_that_it_names(
    arguments: list[str], path: tuple[object, ...], value: object
) -> None:
    before = repr(RECIPE)
    found = place(recipes.override(RECIPE, arguments), *path)
    assert found == value
    assert type(found) is type(value)
    assert repr(RECIPE) == before


def test_what_is_not_overridden_stays() -> None:
    assert recipes.override(RECIPE, []) == RECIPE
    changed = recipes.override(RECIPE, ["--model.lr", "1"])
    changed["model"]["init_args"]["lr"] = 0.1
    assert changed == RECIPE
    changed["data"]["init_args"]["env"]["class_path"] = "Other"
    changed["trainer"]["callbacks"].clear()
    assert changed != RECIPE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--framez", "5"], "--framez: a recipe has no key 'framez'; did you mean --frames?"),
        (["--lr", "5"], "--lr: a recipe has no key 'lr'; did you mean --model.lr?"),
        (["--frames"], "--frames needs a value"),
        (["--frames="], "--frames needs a value"),
        (["--frames", "--seed", "1"], "--frames needs a value"),
        (["frames", "5"], "'frames' is no option"),
        (["--model..lr", "5"], "'--model..lr' is no option"),
        (["--model.lr", "{a"], "--model.lr: '{a' is no YAML: did not find expected ',' or '}'"),
        (["--model.lr.x", "1"], "--model.lr.x: 0.1 is there, in which there is no key 'x'"),
        (["--trainer.callbacks.2.every", "1"], "--trainer.callbacks.2.every: the list there has 2 item(s)"),
        (["--trainer.devices+=1"], "command line: key `trainer.devices+` appends a list to a list, but found 1"),
    ],
)
def test_an_option_that_leads_nowhere_is_refused_in_one_sentence(arguments: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipes.override(RECIPE, arguments)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
