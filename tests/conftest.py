"""Tests are the same in the foreground and as somebody's background job."""

import signal

# A shell starts background jobs with SIGINT ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
