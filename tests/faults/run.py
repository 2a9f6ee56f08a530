"""The faults at full size: `make faults`. Writes what was seen as JSON and as Markdown tables.

    python tests/faults/run.py [--frames N] [--hostile N] [--pause S] [--only REGEX]
                               [--report FILE.json] [--table FILE.md]

In parts: `--only` chooses faults, `--hostile 0` leaves out the bad records, and what FILE.json
holds of other parts stays in it and in the table.

Each fault has a stream of its own; it strikes after a third of the frames. The exit code is 1 when
a frame was lost, doubled, out of order or without its evidence, or a bad record ended wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bad_input import bad_input
from world import Fault, Frames, World, faults, leader_killed, strike

MARK = "<!-- make faults writes what follows -->"
FPS = 80.0
MEMORY_BOUND_MB = 2560
"""Of one consumer, whatever is sent: docs/faults.md says what it is made of."""


def struck(world: World, fault: Fault, number: int, num_frames: int) -> dict[str, Any]:
    """One stream, one fault, one account."""
    frames = Frames(world, f"s{number}", num_frames, FPS)
    try:
        frames.wait_sent(num_frames // 3)
        times = strike(world, fault)
        sent = frames.wait_end()
    finally:
        frames.kill()
    world.wait_scored(300)
    account = world.account(sent, patience_s=60)
    found = {"fault": fault.name, **times, **asdict(account), "perfect": account.perfect}
    return found | {"run": machine()}


@contextmanager
def opened(brokers: int) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder, World(Path(folder), brokers=brokers) as world:
        yield world


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults at full size.")
    parser.add_argument("--frames", type=int, default=3000, help="per fault")
    parser.add_argument("--hostile", type=int, default=10_000, help="bad records; 0: none")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds of a SIGSTOP")
    parser.add_argument("--only", default="", help="faults whose name this expression finds")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, help="Markdown file: what is below MARK is replaced")
    options = parser.parse_args()
    kept = read_report(options.report)
    rows: list[dict[str, Any]] = []
    hostile: dict[str, Any] = {}

    for brokers, known in ((3, [leader_killed()]), (1, faults(options.pause))):
        chosen = [fault for fault in known if re.search(options.only, fault.name)]
        num_hostile = options.hostile if brokers == 1 else 0
        if not chosen and not num_hostile:
            continue
        with opened(brokers) as world:
            if num_hostile:
                found = bad_input(world, num_hostile)
                # Not asdict: it makes a Counter of a Counter's items.
                hostile = {each.name: getattr(found, each.name) for each in fields(found)}
                hostile["run"] = machine()
                print(json.dumps(hostile), flush=True)
            for fault in chosen:
                rows.append(struck(world, fault, len(rows), options.frames))
                print(json.dumps(rows[-1]), flush=True)
    done = {row["fault"]: row for row in [*kept["faults"], *rows]}
    report = {"faults": list(done.values()), "bad_input": hostile or kept["bad_input"]}
    if options.report:
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    text = f"{table(report['faults'])}\n\n{bad_table(report['bad_input'])}".rstrip() + "\n"
    print(f"\n{text}")
    if options.table:
        above = options.table.read_text().partition(MARK)[0] if options.table.exists() else ""
        options.table.write_text(f"{above}{MARK}\n\n{text}")
    return 0 if all(row["perfect"] for row in rows) and fine(hostile) else 1


def read_report(path: Path | None) -> dict[str, Any]:
    """What earlier runs have found."""
    if path is None or not path.exists():
        return {"faults": [], "bad_input": {}}
    return dict(json.loads(path.read_text()))


def fine(hostile: dict[str, Any]) -> bool:
    if not hostile:
        return True
    wrong = hostile["wrong"] or hostile["good_wrong"] or hostile["miscounted"]
    return not wrong and hostile["peak_mb"] <= MEMORY_BOUND_MB


def machine() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    day = datetime.now(UTC).date()
    return f"{os.cpu_count()} cores {platform.machine()}, commit {commit or 'unknown'}, {day}"


def table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = {
        "fault": "Fault",
        "sent": "Frames",
        "scored": "Results",
        "dead": "Dead letters",
        "lost": "Lost",
        "twice": "Twice",
        "unordered_cameras": "Out of order",
        "evidence_missing": "Evidence missing",
        "down_s": "Down, s",
        "back_s": "Back after, s",
    }
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[str(row[name]) for name in columns] for row in rows]
    runs = "; ".join(dict.fromkeys(row["run"] for row in rows))
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\nRun on: {runs}."


def bad_table(hostile: dict[str, Any]) -> str:
    if not hostile:
        return ""
    lines = ["| What was sent | Records |", "| --- | --- |"]
    lines += [f"| {kind} | {count} |" for kind, count in sorted(hostile["hostile"].items())]
    lines += ["", "| What became of it | Records |", "| --- | --- |"]
    outcomes = sorted(hostile["outcomes"].items())
    lines += [f"| {reason or 'scored'} | {count} |" for reason, count in outcomes]
    lines += [
        "",
        f"Good frames among them: {hostile['good']}, not scored exactly once: "
        f"{hostile['good_wrong']}. Ended otherwise than they may: {len(hostile['wrong'])}. "
        f"Memory of a consumer: {hostile['idle_mb']} MB idle, {hostile['peak_mb']} MB at most. "
        f"Run on: {hostile['run']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
