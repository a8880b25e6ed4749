"""What a run was made on: the processor, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def hardware() -> str:
    """What this runs on, in a few words: the GPU's name, or the processor's and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def git_commit() -> str:
    """Commit of the checkout around the working directory, with a `+` where it has changes; '' outside of one."""
    try:
        show = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if show.returncode:
            return ""
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, timeout=5).returncode
    except (OSError, subprocess.SubprocessError):
        return ""
    return show.stdout.strip() + ("+" if changed else "")
