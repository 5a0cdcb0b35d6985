"""One row a step, in metrics.jsonl, in TensorBoard where it is installed, and to whoever watches."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from probes.store import write_text

METRICS = "metrics.jsonl"


class Metrics:
    """Rows of a run. A resumed run starts with those of its checkpoint; what was written after that is dropped."""

    def __init__(
        self, out: Path | None, rows: Iterable[Mapping[str, Any]] = (), *,
        watch: Callable[[Mapping[str, Any]], None] | None = None,
    ):  # fmt: skip
        self.path, self.watch = None if out is None else out / METRICS, watch
        self.rows = list(rows)
        self.board: Any = None
        if self.path is None:
            return
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if importlib.util.find_spec("tensorboard"):
            board = importlib.import_module("torch.utils.tensorboard")
            self.board = board.SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=len(self.rows) + 1)

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
