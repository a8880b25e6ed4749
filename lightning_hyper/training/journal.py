"""Metrics on disk before they are anywhere else, so that neither a kill nor a lost database loses one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_hyper.folder import RunFolder


class Journal:
    """All rows of a run's metrics in the order of their frames, a JSON object a line, and how many of them are sent.

    One thread may append while another sends.

    Args:
        folder: of the run.
        frames: keeps the rows up to this frame, from which the run goes on; None begins with none.
    """

    def __init__(self, folder: RunFolder, frames: int | None = None) -> None:
        self._rows, self._mark = folder.metrics, folder.sent
        folder.path.mkdir(parents=True, exist_ok=True)
        end = 0
        if frames is not None and self._rows.exists():
            with self._rows.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > frames:
                        break
                    end += len(line)
        with self._rows.open("ab") as file:
            file.truncate(end)
        self.sent = min(end, self._read_mark()) if end else 0

    def _read_mark(self) -> int:
        try:
            return int(self._mark.read_text())
        except (OSError, ValueError):  # sent twice is sent once, in MLflow
            return 0

    def append(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        """Write a row.

        Args:
            metrics: values by name.
            step: frames.
            timestamp: milliseconds since 1970.
        """
        row = {"step": step, "timestamp": timestamp, "metrics": dict(metrics)}
        with self._rows.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")

    def unsent(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """The next rows that are not sent, of at most so many metrics or else one, and the place after them."""
        rows: list[dict[str, Any]] = []
        end, count = self.sent, 0
        with self._rows.open("rb") as file:
            file.seek(end)
            for line in file:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is None or (rows and count + len(row["metrics"]) > most):
                    break
                rows.append(row)
                end, count = end + len(line), count + len(row["metrics"])
        return rows, end

    def mark(self, end: int) -> None:
        """Say that all before this place is sent."""
        self.sent = end
        self._mark.write_text(str(end))
