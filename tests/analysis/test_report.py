"""Reports are made from the runs that count, hold the right numbers, and go back to MLflow."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from scipy.stats import ttest_ind

from lightning_hyper.analysis.report import Environment, ReportError, report


class Lab:
    """An MLflow database and the means to fill it with runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")

    def experiment(self, name: str) -> str:
        return str(self.client.create_experiment(name, (self.root / "artifacts").as_uri()))

    def run(
        self,
        experiment: str,
        values: Sequence[float],
        *,
        frames: Sequence[int] = (0, 50, 100),
        seed: int = 0,
        method: str = "RNN",
        environment: str = "GridNavi",
        variant: str = "",
        status: str = "FINISHED",
        ended: int = 1_000,
        episodes: Sequence[float] = (),
        tasks: Mapping[str, float] | None = None,
        kind: str = "fit",
    ) -> str:
        about = {"method": method, "environment": environment, "variant": variant, "seed": str(seed), "kind": kind}
        run = self.client.create_run(experiment, start_time=1, run_name=f"{method}-{variant}-{seed}-{ended}")
        points = [Metric("eval/return", value, 0, frame) for value, frame in zip(values, frames, strict=True)]
        points += [Metric(f"eval/episode_{k}", value, 0, frames[-1]) for k, value in enumerate(episodes, 1)]
        points += [Metric(f"eval/return/{task}", value, 0, frames[-1]) for task, value in (tasks or {}).items()]
        points += [Metric("time/frames_per_second", 1000.0 + 10 * seed, 0, frame) for frame in frames if points]
        self.client.log_batch(run.info.run_id, points, tags=[RunTag(key, text) for key, text in about.items()])
        if status == "RUNNING":
            self.client.update_run(run.info.run_id, status=status)
        else:
            self.client.set_terminated(run.info.run_id, status, ended)
        return str(run.info.run_id)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))  # one database for all, since making one takes seconds


def cells(environment: Environment, label: str) -> dict[str, str]:
    row = next(row for row in environment.rows if row[0] == label)
    return dict(zip(environment.header, row, strict=True))


def test_a_table_holds_the_statistics_of_each_method(lab: Lab) -> None:
    experiment = lab.experiment("statistics")
    for seed, final in enumerate([1, 2, 3, 4, 100]):
        lab.run(experiment, [0, 0, final], seed=seed, episodes=[seed, 2 * seed])
    lab.run(experiment, [5, 5, 50], method="RNN+HN", episodes=[7, 8])
    made = report("statistics", lab.root)
    (environment,) = made.environments
    assert [one.label for one in environment.series] == ["RNN+HN", "RNN"]  # the best first
    rnn = cells(environment, "RNN")
    assert rnn["frames"] == "100"
    assert rnn["final"].startswith("3.00 [")  # (0.75 * 2 + 3 + 0.75 * 4) / 2.5
    assert rnn["final"].endswith("] n=5")
    assert rnn["area"].startswith("0.75 [")  # a quarter of the final value
    assert rnn["frames/s"] == "1,020"
    assert (rnn["episode 1"], rnn["episode 2"]) == ("2.00", "4.00")
    assert cells(environment, "RNN+HN")["final"] == "50.00 (50.00 to 50.00) n=1"
    for text in (made.text, made.markdown):
        assert "RNN+HN" in text
        assert rnn["final"] in text


def test_returns_of_tasks_and_many_episodes_stand_in_columns_of_their_own(lab: Lab) -> None:
    experiment = lab.experiment("columns")
    lab.run(experiment, [0, 0, 1], tasks={"MiniGrid-LavaGapS7-v0": 0.5, "MiniGrid-DoorKey-6x6-v0": 0.25}, seed=0)
    lab.run(experiment, [0, 0, 1], tasks={"MiniGrid-LavaGapS7-v0": 1.0, "MiniGrid-DoorKey-6x6-v0": 0.75}, seed=1)
    lab.run(experiment, [0, 0, 1], episodes=range(11), environment="GridNavi, long")
    tasks, trials = sorted(report("columns", lab.root).environments, key=lambda environment: len(environment.name))
    assert tasks.header[3:5] == ["DoorKey-6x6", "LavaGapS7"]
    assert [cells(tasks, "RNN")[name] for name in tasks.header[3:5]] == ["0.50", "0.75"]
    assert trials.header[3:14] == [f"episode {k}" for k in range(1, 12)]


def test_differences_to_a_method_and_their_corrected_p_stand_in_columns_of_their_own(lab: Lab) -> None:
    experiment = lab.experiment("differences")
    finals = {"RNN": [3, 4, 5, 6, 7], "RNN+HN": [7, 8, 9, 10, 6], "RNN+FiLM": [5, 6, 4], "RNN+S": [4, 6]}
    for method, values in finals.items():
        for seed, value in enumerate(values):
            lab.run(experiment, [0, 0, value], seed=seed, method=method)
    lab.run(experiment, [0, 0, 1], method="RNN+HN", environment="elsewhere")
    for seed in range(3):
        for method, value in (("RNN", 500), ("RNN+S", 400)):
            lab.run(experiment, [0, 0, value], method=method, environment="level", seed=seed)
    made = report("differences", lab.root, against="RNN")
    gridnavi, elsewhere, level = made.environments
    tested = {method: ttest_ind(finals[method], finals["RNN"], equal_var=False) for method in ("RNN+HN", "RNN+FiLM")}
    low, high = tested["RNN+HN"].confidence_interval()
    hn = cells(gridnavi, "RNN+HN")
    assert hn["difference"] == f"3.00 [{low:.2f}, {high:.2f}] n=5 v 5"
    assert hn["p"] == f"{2 * tested['RNN+HN'].pvalue:.3f}"  # of two tests, the smaller p
    assert cells(gridnavi, "RNN+FiLM")["p"] == f"{tested['RNN+FiLM'].pvalue:.3f}"
    assert cells(gridnavi, "RNN+S")["difference"] == "0.00 (-3.00 to 3.00) n=2 v 5"  # 4 - 7, 6 - 3
    assert cells(gridnavi, "RNN+S")["p"] == "-"
    for row in (cells(gridnavi, "RNN"), cells(elsewhere, "RNN+HN")):
        assert row["difference"] == row["p"] == "-"
    assert cells(level, "RNN+S")["difference"] == "-100.00, no seed differs n=3 v 3"
    assert cells(level, "RNN+S")["p"] == "-"
    assert "Welch's t test" in made.text
    assert "Holm's correction" in made.text
    assert "difference" not in report("differences", lab.root).environments[0].header
    with pytest.raises(ReportError, match=r"--against: no run has the method 'GRU'; there are RNN, RNN\+FiLM, RNN\+HN"):
        report("differences", lab.root, against="GRU")


def test_the_reports_run_is_described_by_its_tables_where_mlflow_can_keep_them(lab: Lab) -> None:
    experiment = lab.experiment("described")
    for k in range(60):
        lab.run(experiment, [1, 2, 3], method=f"method {k}")
        if k in (0, 59):
            made = report("described", lab.root)
            note = lab.client.get_run(made.run_id).data.tags["mlflow.note.content"]
            assert len(note) <= 5000
            assert ("| method 0 | 100 | 3.00" in note) == (k == 0)
            assert ("report.md" in note) == (k == 59)


def test_files_are_written_and_logged_to_one_run_used_again(lab: Lab) -> None:
    experiment = lab.experiment("files")
    run_id = lab.run(experiment, [1, 2, 3], environment="Mine maze")
    lab.run(experiment, [1, 2, 3], environment="GridNavi")
    first = report("files", lab.root, references={"random": -5.2})
    second = report("files", lab.root)
    expected = {"report.md"} | {
        f"{name}{end}" for name in ("GridNavi", "Mine-maze") for end in (".png", "-table.csv", "-curves.csv")
    }
    assert first.folder == lab.root / "files" / "report"
    assert {path.name for path in first.folder.iterdir()} == expected
    assert {file.path for file in lab.client.list_artifacts(first.run_id)} == expected
    assert second.run_id == first.run_id
    assert lab.client.get_run(first.run_id).data.tags["kind"] == "report"
    assert lab.client.get_run(first.run_id).info.status == "FINISHED"
    assert (first.folder / "GridNavi.png").read_bytes().startswith(b"\x89PNG")
    with (first.folder / "Mine-maze-curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run_id"], row["frames"], row["eval/return"]) for row in rows] == [
        (run_id, "0", "1.0"),
        (run_id, "50", "2.0"),
        (run_id, "100", "3.0"),
    ]


def test_runs_of_other_kinds_are_no_training_runs(lab: Lab) -> None:
    experiment = lab.experiment("kinds")
    lab.run(experiment, [1, 1, 1])
    for kind in ("sweep", "report", "test", "validate"):
        lab.run(experiment, [9, 9, 9], kind=kind, method=kind)
    (environment,) = report("kinds", lab.root).environments
    assert [one.label for one in environment.series] == ["RNN"]


def test_the_newest_finished_run_of_a_seed_counts(lab: Lab) -> None:
    experiment = lab.experiment("newest")
    lab.run(experiment, [1, 1, 2], ended=3_000)
    lab.run(experiment, [1, 1, 1], ended=2_000)
    lab.run(experiment, [1, 1, 3], ended=4_000, status="FAILED")
    lab.run(experiment, [1, 1, 4], ended=1_500, variant="lr=0.001")
    for unfinished in (False, True):
        made = report("newest", lab.root, unfinished=unfinished)
        assert cells(made.environments[0], "RNN")["final"].startswith("2.00")
        assert cells(made.environments[0], "RNN (lr=0.001)")["final"].endswith("n=1")
        dropped = "RNN--0-2000, RNN--0-4000" if unfinished else "RNN--0-2000"
        assert f"Dropped, as a newer run has the same method, variant and seed: {dropped}.\n" in made.text


def test_unfinished_runs_are_listed_and_counted_on_request(lab: Lab) -> None:
    experiment = lab.experiment("unfinished")
    lab.run(experiment, [1, 1, 2])
    lab.run(experiment, [1, 1, 6], method="RNN+S", status="RUNNING")
    without = report("unfinished", lab.root)
    assert [one.label for one in without.environments[0].series] == ["RNN"]
    assert "RNN+S--0-1000 (running)" in without.text
    counted = report("unfinished", lab.root, unfinished=True)
    assert cells(counted.environments[0], "RNN+S")["final"].startswith("6.00")


def test_curves_end_where_the_shortest_run_ends(lab: Lab) -> None:
    experiment = lab.experiment("lengths")
    lab.run(experiment, [0, 10], frames=[0, 100])
    lab.run(experiment, [0, 2, 4], frames=[0, 20, 40], seed=1)
    (environment,) = report("lengths", lab.root).environments
    frames, values = environment.series[0].curves()
    assert frames.tolist() == [0, 20, 40]
    assert values.tolist() == [[0, 2, 4], [0, 2, 4]]
    assert cells(environment, "RNN")["frames"] == "40 to 100"


def test_a_frame_logged_again_after_a_resume_counts_once(lab: Lab) -> None:
    experiment = lab.experiment("again")
    run = lab.run(experiment, [0, 1, 2])
    lab.client.log_metric(run, "eval/return", 5.0, timestamp=10, step=50)
    (environment,) = report("again", lab.root).environments
    assert environment.series[0].runs[0].frames.tolist() == [0, 50, 100]
    assert environment.series[0].runs[0].values.tolist() == [0, 5, 2]


def test_a_diverged_seed_is_said_and_shown(lab: Lab) -> None:
    experiment = lab.experiment("diverged")
    lab.run(experiment, [0, 1, float("nan")])
    made = report("diverged", lab.root)
    assert "Not a number" in made.text
    assert "nan" in cells(made.environments[0], "RNN")["final"]


def test_faults_name_the_option_and_what_there_is(lab: Lab, tmp_path: Path) -> None:
    experiment = lab.experiment("faults")
    lab.run(experiment, [1, 2, 3], status="FAILED")
    with pytest.raises(ReportError, match=r"no experiment 'fault'; there are .*faults"):
        report("fault", lab.root)
    with pytest.raises(ReportError, match="not finished"):
        report("faults", lab.root)
    with pytest.raises(ReportError, match="without eval/reward"):
        report("faults", lab.root, metric="eval/reward", unfinished=True)
    with pytest.raises(ReportError, match="--root"):
        report("faults", tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
