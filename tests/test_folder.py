"""The layout of roots and run folders; names are given once, and what is there is found again."""

import os

import pytest

from lightning_hyper.folder import Root, RunFolder


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "runs")


def begin(folder, *checkpoints, age=0.0):
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in checkpoints:
        folder.checkpoint(name).touch()
        os.utime(folder.checkpoint(name), (1e9 - age, 1e9 - age))


def test_a_run_is_found_by_its_checkpoint(root):
    folder = root.run("exp", "a")
    assert folder.path == root.path / "exp" / "a"
    for checkpoint in (folder.last, folder.best, folder.kept(640)):
        assert RunFolder.of_checkpoint(checkpoint) == folder
    assert folder.kept(640).name == "frames=640.ckpt"


def test_an_unused_name_has_the_next_number(root):
    assert root.unused("exp", "a").name == "a"
    begin(root.run("exp", "a"))
    begin(root.run("exp", "a-3"))
    assert root.unused("exp", "a").name == "a-2"
    begin(root.run("exp", "a-2"))
    assert root.unused("exp", "a").name == "a-4"
    assert root.unused("other", "a").name == "a"


def test_the_newest_checkpoint_is_that_of_a_run_of_this_name(root):
    assert root.newest("exp", "a", "last") is None
    begin(root.run("exp", "a"), "last", "best", age=20)
    begin(root.run("exp", "a-2"), "last", age=10)
    begin(root.run("exp", "a-hn"), "last")
    begin(root.run("exp", "ab"), "last")
    assert root.newest("exp", "a", "last") == root.run("exp", "a-2").last
    assert root.newest("exp", "a", "best") == root.run("exp", "a").best
    assert root.newest("exp", "a", "frames=5") is None


def test_a_summary_is_read_as_it_was_written_and_not_when_it_was_cut(root):
    folder = root.run("exp", "a")
    assert folder.summary() is None
    folder.finish({"frames": 5, "eval/return": 1.5})
    assert folder.summary() == {"frames": 5, "eval/return": 1.5}
    folder.finished.write_text('{"frames": 5')
    assert folder.summary() is None
    folder.finished.write_text("[5]")
    assert folder.summary() is None


def test_replay_buffers_are_found(root):
    folder = root.run("exp", "a")
    assert folder.replays() == []
    for frames in (20, 100):
        folder.replay(frames).mkdir(parents=True)
    begin(folder, "last")
    assert set(folder.replays()) == {folder.replay(20), folder.replay(100)}
