"""Notifications from a store that sends them in time, falls silent, or breaks off.

The store is a few lines of HTTP in the manner of MinIO before its flush was lost; the real one is
in tests/integration/test_refresh_watch.py.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import SecretStr

from infra.errors import ServiceUnavailable
from infra.s3_events import listen
from infra.settings import S3Settings, Settings
from pipelines.refresh_loop import _Ears

EVENT = {"Records": [{"s3": {"object": {"key": "plates/incoming/a b+c.parquet"}}}]}


@contextmanager
def store(*script):
    """Answers with the script: bytes are sent, numbers are pauses; then the connection ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for step in script:
                if isinstance(step, bytes):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(step), step))
                else:
                    time.sleep(step)
            self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    s3 = S3Settings(
        endpoint=f"127.0.0.1:{server.server_port}", access_key="a", secret_key=SecretStr("b")
    )
    try:
        yield Settings().model_copy(update={"s3": s3})
    finally:
        server.shutdown()
        server.server_close()


def heard(settings, stop=None, silence_s=1.0):
    keys, signs = [], []

    def run():
        return listen(
            settings,
            "data",
            suffix=".parquet",
            stop=stop or threading.Event(),
            alive=lambda: signs.append(1),
            created=keys.append,
            silence_s=silence_s,
        )

    return run, keys, signs


LINE = json.dumps(EVENT).encode() + b"\n"


def test_events_are_told_as_they_come_however_they_are_cut():
    script = [b" ", b" " + LINE[:20], LINE[20:] + b"  ", LINE + LINE, b"0"]
    with store(*script) as settings:
        run, keys, signs = heard(settings)
        with pytest.raises(ServiceUnavailable):  # it breaks off in the end
            run()
    assert keys == ["plates/incoming/a b+c.parquet"] * 3
    assert len(signs) >= 4


def test_a_store_that_falls_silent_is_an_error_in_time():
    with store(b" ", 5.0) as settings:
        run, _, signs = heard(settings, silence_s=0.5)
        started = time.monotonic()
        with pytest.raises(ServiceUnavailable):
            run()
    assert signs == [1]
    assert time.monotonic() - started < 3


def test_stop_is_seen_at_the_next_sign_of_life():
    stop = threading.Event()
    with store(*[b" ", 0.1] * 50) as settings:
        run, _, _ = heard(settings, stop)
        threading.Timer(0.3, stop.set).start()
        started = time.monotonic()
        assert run() is True
    assert time.monotonic() - started < 2


def test_the_watch_trusts_a_prompt_store_and_hears_incoming_only():
    said = []
    with store(b" ", 0.3, LINE.replace(b"incoming", b"train"), 0.5, b" ", LINE, 3.0) as settings:
        ears = _Ears(settings, said.append)
        ears.start()
        stop, started = threading.Event(), time.monotonic()
        ears.wait(stop, 60)  # the first sign of life: look, something may have come before
        ears.heard.clear()
        ears.wait(stop, 60)
        assert ears.prompt
        assert 0.6 < time.monotonic() - started < 3
        ears.end()
    assert said == ["told of new normals by the notifications of this S3"]
