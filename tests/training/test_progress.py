import os
import pty
import re
import subprocess
import sys

import pytest

# A tiny algorithm under a real trainer: two epochs of three batches of 100 frames, from frame 200 on.
SCRIPT = """
import sys, torch, time
from lightning.pytorch import Trainer
from lightning_hyper.algorithms import Algorithm
from lightning_hyper.training.progress import ProgressBar

class Tiny(Algorithm):
    def build(self, spaces): pass
    policy = None
    def learn(self, batch): return []
    def configure_model(self): pass
    def configure_optimizers(self): return None
    def training_step(self, batch, batch_idx):
        time.sleep(0.11)  # longer than tqdm waits before it draws again
        self.clock.frames += 100
        if "nan" in sys.argv: raise FloatingPointError("no more")
        self.log("train/return", 10.0 + batch_idx, batch_size=1)
    def validation_step(self, batch, batch_idx): self.log("eval/return", 12.9, batch_size=1)
    def test_step(self, batch, batch_idx): self.log_dict({"test/return": 1.25, "test/episode_1": -3.5}, batch_size=1)
    def on_save_checkpoint(self, checkpoint): pass

model = Tiny()
model.clock.frames, model.clock.budget = 200, 800
trainer = Trainer(max_epochs=2, callbacks=[ProgressBar()], accelerator="cpu", logger=False, num_sanity_val_steps=0,
                  enable_checkpointing=False, enable_model_summary=False)
if sys.argv[1] == "fit": trainer.fit(model, [0, 1, 2], [0])
elif sys.argv[1] == "validate": trainer.validate(model, [0])
else: trainer.test(model, [0])
"""


def run_piped(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def run_in_terminal(*arguments):
    """What a terminal of 120 columns is sent."""
    outer, inner = pty.openpty()
    os.environ["COLUMNS"] = "120"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=subprocess.DEVNULL)
    os.close(inner)
    sent = b""
    while True:
        try:
            part = os.read(outer, 4096)
        except OSError:  # the terminal is closed: the program has ended
            break
        if not part:
            break
        sent += part
    os.close(outer)
    process.wait(timeout=60)
    return sent.decode()


def test_without_a_terminal_there_is_one_line_an_epoch():
    out = run_piped("fit").stdout
    lines = [line for line in out.splitlines() if "frames" in line]
    assert [line.split("  ")[0] for line in lines] == ["frames 500/800", "frames 800/800"]
    assert [line.split("  ")[2:] for line in lines] == [["train/return 12.00", "eval/return 12.90"]] * 2
    assert "\r" not in out
    # 300 frames in at least 0.33 s, and the 200 of an earlier session don't count
    rates = [float(re.search(r"([\d.]+)k frames/s", line)[1]) for line in lines]
    assert all(0.2 <= rate <= 0.9 for rate in rates)


def test_on_a_terminal_one_bar_is_rewritten_in_place():
    sent = run_in_terminal("fit")
    drawn = [part for part in re.split(r"[\r\n]+", sent) if "frames" in part]
    assert len(drawn) >= 5
    assert "200/800" in drawn[0]
    assert re.search(r"100%.*800/800 frames.*train/return 12\.00  eval/return 12\.90", drawn[-1])
    assert "eval/return" not in drawn[1]
    bars = sent[sent.index(drawn[0]) : sent.index(drawn[-1])]
    assert "\n" not in bars  # one line, and no second bar for validation


def test_the_bar_is_closed_when_training_fails():
    assert run_in_terminal("fit", "nan").rstrip(" ").count("\n") >= 1
    done = run_piped("fit", "nan")
    assert done.returncode == 1
    assert "FloatingPointError: no more" in done.stderr


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_verbs_print_their_metrics_once_and_aligned(verb):
    out = run_piped(verb).stdout
    expected = {"validate": {"eval/return": 12.9}, "test": {"test/return": 1.25, "test/episode_1": -3.5}}[verb]
    for key, value in expected.items():
        assert out.count(key) == 1
        line = next(line for line in out.splitlines() if key in line)
        assert line == f"{key:20} {value:10.3f}"
    assert "─" not in out  # Lightning's own table
