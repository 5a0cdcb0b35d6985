"""The command line: `dispositions verify | train | localize | compare | probe | capture | behaviors | report | export |
import | calibrate`.

Exit codes: 0 PASS (or done), 1 FAIL, 3 INCONCLUSIVE, 2 wrong input (one line says what is wrong), 70 a fault of the
program itself. Many verdicts at once (`report --models ...`) leave with the worst of them: 70, 2, 1, 3, 0.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

import tyro

from dispositions.behaviors import Behaviors
from dispositions.calibration import Calibrate
from dispositions.commands import Capture, Compare, Localize, Probe, Report, Verify
from dispositions.training import Train
from dispositions.vectors import Export, Import
from probes.errors import WrongInput

LAYERS = tuple[int, ...] | None
NUMBERS = {int | None: ("INT", int), float | None: ("FLOAT", float)}
COMMANDS = {
    "verify": Verify, "train": Train, "localize": Localize, "compare": Compare, "probe": Probe, "capture": Capture,
    "behaviors": Behaviors, "report": Report, "export": Export, "import": Import,
    "calibrate": Calibrate,
}  # fmt: skip


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Layers and heads are written `auto` or `3,5` on the command line; numbers that may be None `auto` or `3`."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def layers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != LAYERS:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="auto|3,5",
            instance_from_str=lambda words: _layers(words[0]),
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda value: ["auto" if value is None else ",".join(map(str, value))],
        )

    @registry.primitive_rule
    def numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type not in NUMBERS:
            return None
        name, kind = NUMBERS[info.type]
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"auto|{name}",
            instance_from_str=lambda words: _number(words[0], kind),
            is_instance=lambda value: value is None or isinstance(value, (int, float)),
            str_from_instance=lambda value: ["auto" if value is None else str(value)],
        )

    return registry


def _number(text: str, kind: Any) -> Any:
    if text == "auto":
        return None
    try:
        return kind(text)
    except ValueError:
        raise WrongInput(f"'{text}' is no {'whole ' if kind is int else ''}number; auto is allowed too") from None


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise WrongInput(f"layers and heads are written auto, 3 or 3,5, saw '{text}'") from None


def _parse(arguments: Sequence[str] | None) -> Any:
    """The command that was asked for. What the parser has to say about a wrong one is brought into one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="dispositions",
                description="Which way does a model lean, where does the lean live, and did training move it?",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(),
            )
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        raise WrongInput(f"{_one_line(said.getvalue())}; see --help") from None


def _one_line(box: str) -> str:
    """What a box of the parser says: a title, the fault, then advice, between rules of one sign or another."""
    rows = [line.strip("│ ") for line in box.splitlines()]
    if rows[0].startswith("╭"):  # the title is a part of the frame
        rows = ["", "─" * 9, *rows[1:-1]]
    parts = re.split(r"\n[─-]{9,}\n", "\n".join(rows))
    said = [" ".join(part.split()).rstrip(".") for part in parts[1:]]
    return "; ".join(_meant(part) for part in said if part and not part.startswith(("For full", "Argument helptext")))


def _meant(part: str) -> str:
    """Suggestions without their help texts."""
    if not part.startswith("Perhaps you meant"):
        return part
    return "perhaps you meant " + ", ".join(dict.fromkeys(re.findall(r"(?<!\S)--[a-z-]+(?= [A-Z\[{])", part)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and leave with the command's exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign is no reason to stop
    try:
        code = _parse(arguments).run()
    except WrongInput as error:
        print(f"dispositions: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:  # a folder that cannot be made, a full disk
        said = f"{error.strerror}: '{error.filename}'" if error.filename else str(error) or type(error).__name__
        print(f"dispositions: {said}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("dispositions: interrupted; finished files are kept, run the same command to resume", file=sys.stderr)
        code = 130
    except Exception:  # noqa: BLE001 - a crash must never look like the verdict FAIL, which is exit code 1
        traceback.print_exc()
        code = 70
    sys.exit(code)


if __name__ == "__main__":
    main()
