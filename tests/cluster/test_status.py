"""What `dpdl status` asks of the console: where it asks, and what a refusal is."""

import http.server
import socket
import threading

import pytest
from pydantic import SecretStr

from cluster import status
from cluster.status import _stream
from infra.errors import AuthFailed, ServiceUnavailable
from infra.settings import ServeSettings, Settings
from serving.console.api import STATUS_S


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        body = b'{"scorer": {}}'
        self.send_response(self.server.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.code, server.asked = 200, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def settings_of(server):
    serve = ServeSettings(http_port=server.server_address[1], token=SecretStr("hunter2"))
    return Settings(serve=serve)


def test_the_token_goes_to_the_console_and_through_no_proxy(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert _stream(settings_of(server)) == {"scorer": {}}
    assert server.asked == [("/api/v1/status", "Bearer hunter2")]


@pytest.mark.parametrize("code", [401, 403])
def test_a_stream_that_refuses_the_token_is_not_said_to_be_down(server, code):
    server.code = code
    with pytest.raises(AuthFailed, match=rf"running at .*refuses our serve\.token \({code}\)"):
        _stream(settings_of(server))


def test_a_stream_in_trouble_is_not_said_to_be_down(server):
    server.code = 503
    with pytest.raises(ServiceUnavailable, match=r"running at .*, answers 503: .*scorer"):
        _stream(settings_of(server))


def test_a_stream_that_hangs_is_not_said_to_be_down(monkeypatch):
    assert status.ASK_S > STATUS_S  # else it would not hear of a replica that hangs
    monkeypatch.setattr(status, "ASK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        serve = ServeSettings(http_port=silent.getsockname()[1])
        with pytest.raises(ServiceUnavailable, match="no answer from"):
            _stream(Settings(serve=serve))


def test_where_nobody_listens_no_stream_runs():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serve = ServeSettings(http_port=taken.getsockname()[1])
    assert _stream(Settings(serve=serve)) == {}


def test_an_address_of_ipv6_is_in_brackets():
    assert ServeSettings(http_host="::1").url == "http://[::1]:8000/"
    assert ServeSettings().url == "http://127.0.0.1:8000/"
