import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.training import progress
from lightning_hyper.training.progress import Line, ProgressBar

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*run with no optimizer.*"),
]


class Tiny(Algorithm):
    """100 frames a batch, in a little more time than tqdm waits before it draws again."""

    policy = None
    fails = False

    def build(self, spaces):
        pass

    def learn(self, batch):
        return []

    def parameter_groups(self):
        return []

    def configure_model(self):
        pass

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        if self.fails:
            raise FloatingPointError("no more")
        time.sleep(0.11)
        self.clock.frames += 100
        self.log("train/return", 10.0 + batch_idx, batch_size=1)

    def validation_step(self, batch, batch_idx):
        self.log("eval/return", 12.9, batch_size=1)

    def test_step(self, batch, batch_idx):
        self.log_dict({"test/return": 1.25, "test/episode_1": -3.5}, batch_size=1)


class Evaluations(Callback):
    """Evaluates after every third batch, as `Run` does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 3 == 2:
            for callback in trainer.callbacks:
                if hasattr(callback, "on_evaluation_end"):
                    callback.on_evaluation_end(trainer, pl_module, {"eval/return": 12.9, "eval/length": 3.0})


class Logged(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


def run(verb, fails=False, logger=False):
    """Six batches and two evaluations, continued at frame 200 of 800."""
    model = Tiny(max_grad_norm=None, lr_schedule="constant")
    model.fails = fails
    model.clock.frames, model.clock.budget = 200, 800
    quiet = {"logger": logger, "enable_checkpointing": False, "enable_model_summary": False}
    callbacks = [Evaluations(), ProgressBar()]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", limit_val_batches=1, **quiet)
    loaders = (range(6),) if verb == "fit" else ([0],)
    getattr(trainer, verb)(model, *loaders)


@pytest.fixture
def terminal(request, monkeypatch):
    """A `run` with a terminal of so many columns as standard output, 120 by default, and the bytes sent there."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, getattr(request, "param", 120), 0, 0))
    sent = bytearray()

    def read():
        while True:
            try:
                part = os.read(outer, 4096)
            except OSError:  # the other side is closed
                return
            if not part:
                return
            sent.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    stream = os.fdopen(inner, "w")

    def run_there(*arguments, **keywords):
        try:
            with monkeypatch.context() as patch:  # not before the test, since pytest puts its own standard output there
                patch.setattr(sys, "stdout", stream)
                run(*arguments, **keywords)
        finally:
            stream.close()
            thread.join(5)

    yield run_there, sent
    os.close(outer)


def test_without_a_terminal_there_is_one_line_an_evaluation(capsys, monkeypatch):
    seconds = iter([10.0, 12.0, 15.0])  # at the start, and at each evaluation
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    logger = Logged()
    run("fit", logger=logger)
    out = capsys.readouterr().out
    # The 200 frames of an earlier session are none of this one's speed: 300 in 2 s, 600 in 5 s.
    assert [line for line in out.splitlines() if "frames" in line] == [
        "frames 500/800  150 frames/s  train/return 12.00  eval/return 12.90",
        "frames 800/800  120 frames/s  train/return 15.00  eval/return 12.90",
    ]
    assert "\r" not in out
    speeds = [(step, row) for step, row in logger.rows if "time/frames_per_second" in row]
    assert speeds == [
        (500, {"time/frames_per_second": 150.0, "time/seconds": 2.0}),
        (800, {"time/frames_per_second": 120.0, "time/seconds": 5.0}),
    ]


def test_on_a_terminal_one_bar_is_rewritten_in_place(terminal):
    run_there, received = terminal
    run_there("fit")
    sent = received.decode()
    drawn = [part for part in re.split(r"[\r\n]+", sent) if "frames" in part]
    assert len(drawn) >= 5
    assert "200/800" in drawn[0]
    assert re.search(r"100%.*800/800 frames.*train/return 15\.00  eval/return 12\.90", drawn[-1])
    assert "eval/return" not in drawn[1]
    bars = sent[sent.index(drawn[0]) : sent.index(drawn[-1])]
    assert "\n" not in bars  # one line, and no second bar for validation


@pytest.mark.parametrize(
    ("terminal", "told"),
    [
        (80, r"800/800 \[00:0\d<00:00, .*/s\] train 15\.00  eval 12\.90"),
        (60, r"800/800 \[00:0\d<00:00\] train 15\.00  eval 12\.90"),
        (40, r"eval 12\.90"),
    ],
    indirect=["terminal"],
    ids=["80", "60", "40"],
)
def test_the_bar_and_the_return_are_seen_on_a_narrow_terminal(terminal, told, request):
    run_there, received = terminal
    run_there("fit")
    drawn = [part for part in re.split(r"[\r\n]+", received.decode()) if "%" in part]
    columns = int(request.node.callspec.id)
    assert all(len(line) <= columns for line in drawn)
    assert re.fullmatch(rf"100% █{{8,}} {told}", drawn[-1])


@pytest.mark.parametrize("columns", range(30, 160, 7))
@pytest.mark.parametrize("seconds", [59.0, 400_000.0])
@pytest.mark.parametrize("total", [3_000_000, None])
def test_the_line_fits_whatever_the_numbers(columns, seconds, total):
    line = Line(total=total, initial=0, unit="", unit_scale=True, file=io.StringIO(), ncols=columns)
    line.n, line.start_t, line.last_print_t = 1_234_567, line._time() - seconds, line._time()
    line.returns = {"train/return": -1234.5, "eval/return": -9876.54}
    text = str(line)
    line.close()
    assert len(text) <= columns
    assert "eval" in text
    assert "-9876.54" in text
    if total:
        assert len(re.search(r"% (.*?) (?=\d|eval)", text)[1]) >= 8


def test_the_bar_is_closed_when_training_fails(terminal):
    run_there, received = terminal
    with pytest.raises(FloatingPointError, match="no more"):
        run_there("fit", fails=True)
    assert received.endswith(b"\n")  # the traceback begins on a line of its own


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_verbs_print_their_metrics_once_and_aligned(verb, capsys):
    run(verb)
    out = capsys.readouterr().out
    expected = {"validate": {"eval/return": 12.9}, "test": {"test/return": 1.25, "test/episode_1": -3.5}}[verb]
    for key, value in expected.items():
        assert out.count(key) == 1
        line = next(line for line in out.splitlines() if key in line)
        assert line == f"{key:20} {value:10.3f}"
    assert "─" not in out  # Lightning's own table
