"""Where a replica's own lines go: stderr, which Ray keeps in the session's log folder."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Once per replica. One line per event; libraries speak up from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    ours = logging.getLogger("dpdl")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO)
