"""One row a step, in metrics.jsonl, in TensorBoard where it is installed, and to whoever watches."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from probes.store import read_text, write_text

METRICS = "metrics.jsonl"


class Metrics:
    """Rows of a run. A resumed run keeps the rows up to the step it goes on from, and drops any after that."""

    def __init__(self, out: Path | None, *, start: int = 0, watch: Callable[[Mapping[str, Any]], None] | None = None):
        self.path, self.watch = None if out is None else out / METRICS, watch
        self.rows: list[Mapping[str, Any]] = []
        self.board: Any = None
        if self.path is None:
            return
        if self.path.is_file():
            self.rows = [row for row in _whole(self.path) if row["step"] <= start]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if importlib.util.find_spec("tensorboard"):
            board = importlib.import_module("torch.utils.tensorboard")
            self.board = board.SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers of a row have names, and `step` among them."""
        self.rows.append(row)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.board:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
        if self.watch:
            self.watch(row)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()


def _whole(path: Path) -> list[dict[str, Any]]:
    """Rows that were written whole: a killed process may leave half a line at the end."""
    rows = []
    for line in read_text(path).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows
