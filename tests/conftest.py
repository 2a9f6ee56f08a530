"""Tests are the same in the foreground, as somebody's background job, and beside each other."""

import os
import signal

# A shell starts background jobs with SIGINT ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A process of pytest-xdist may begin with a terminal's size; what a test sets would not count.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
