"""One line from a service's log: why it did not come up, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 64 * 1024
_QUOTE_CHARS = 200
_TROUBLE = re.compile(r"\b(FATAL|ERROR|F\d{4}|E\d{4})\b|error|exception|cannot|fail", re.IGNORECASE)
_STACK_TRACE = re.compile(r"^\s+at |^\s*\.\.\. \d+ more|^\s*$")
_ADVICE = (
    (r"already in use|failed to bind|failed listening", "a port is taken: start again"),
    (r"no space left|disk full|quota exceeded", "the disk is full: free some space"),
    (
        r"out ?of ?memory|cannot allocate|insufficient memory|could not reserve",
        "memory is short: end other programs",
    ),
    (r"permission denied|AccessDenied", "the state folder must be writable by you alone"),
    (
        r"cluster\.?id|corrupt|bad file format|checksum|inconsistent",
        "its data is damaged: set DPDL_STATE_DIR to a new folder, or remove this one",
    ),
)


def explain(found: str, log: Path) -> str:
    """`found`, the log's last line that tells something, and advice, as one line."""
    quote = last_telling_line(log)
    advice = next(
        (text for pattern, text in _ADVICE if re.search(pattern, quote, re.IGNORECASE)),
        "see the log",
    )
    said = f': "{quote}"' if quote else ""
    return f"{found}{said}; {advice} ({log})"


def last_telling_line(log: Path) -> str:
    """The last line that speaks of trouble, else the last that is not part of a stack trace."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines() if not _STACK_TRACE.match(line)]
    telling = [line for line in lines if _TROUBLE.search(line)] or lines
    return telling[-1][:_QUOTE_CHARS] if telling else ""
