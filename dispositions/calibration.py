"""The command that measures the gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from analysis.calibrate import CalibrationConfig, calibrate
from analysis.calibration import RESULT
from analysis.calibration_report import write_calibration_report
from dispositions.runs import checked


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Measure the gate itself: how often it passes nonsense, and how often it finds what was planted.

    Sends 228 nulls and 72 plants of known truth, 42 of them at the working strength, through the gate on the organism,
    and writes calibration.json, cases.jsonl (a line a case: an interrupted run goes on where it stopped) and
    report.html. That takes an hour or more on two cores. Exit code 0 when at most 1% of the nulls pass (at most 3% with
    95% confidence) and at least 95% of the plants at the working strength do, 1 otherwise, 2 wrong input.

    dispositions calibrate

    dispositions calibrate --seeds 3 --out runs/calibration-quick
    """

    out: Path | None = None
    """Folder of the run; runs/calibration when not given."""
    config: CalibrationConfig = field(default_factory=CalibrationConfig)

    def run(self) -> int:
        out = checked(self.out, Path("runs") / "calibration")
        found = calibrate(self.config, out=out)
        found.save(out / RESULT)
        print(found.by_kind().to_string(index=False))
        print(found.criteria().to_string(index=False))
        print(found)
        print(write_calibration_report(found, out / "report.html"))
        return 0 if found.trusted else 1
