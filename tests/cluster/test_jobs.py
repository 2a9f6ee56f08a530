"""`dpdl job`: what is refused before anything is sent. No cluster, no network."""

import asyncio
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from cluster import jobs
from cluster.cli import app
from cluster.jobs import JobRequest, Jobs
from infra.errors import ServiceUnavailable, SettingsError


def dpdl(*args, env=None):
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "job", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["DPDL_REDIS_PASSWORD", "DPDL_S3_SECRET_KEY", "DPDL_SERVE_TOKEN"])
def test_a_secret_never_enters_a_jobs_environment(name):
    with pytest.raises(SettingsError, match=f"{name}_FILE"):
        JobRequest(command="train", variables={name: "x"})


def test_files_of_secrets_and_plain_settings_do():
    named = {"DPDL_REDIS_PASSWORD_FILE": "/run/x", "DPDL_REDIS_PORT": "1", "DPDL_CONFIG": "/x"}
    assert JobRequest(command="train", variables=named).variables == named


@pytest.mark.parametrize("name", ["DPDL_REDIS_PROT", "PATH", "DPDL_REDIS_PORT_FILE"])
def test_what_is_no_setting_is_refused(name):
    with pytest.raises(SettingsError, match="not a setting"):
        JobRequest(command="train", variables={name: "x"})


def test_no_cluster_is_one_line(monkeypatch):
    with pytest.raises(ServiceUnavailable, match="--address"):
        Jobs("http://127.0.0.1:9")


def dashboard_that_refuses():
    """Answers as Ray's dashboard does (http_token_authentication.py): 401 without a token, 403 with
    another cluster's."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            code = 403 if "authorization" in self.headers else 401
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"Unauthorized" if code == 401 else b"Forbidden")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    ("token", "wanted"),
    [(None, "asks for its token, and there is none here"), ("ab" * 32, "refuses the token of /")],
)
def test_no_token_and_a_wrong_one_are_two_messages_of_one_line(tmp_path, token, wanted):
    """In a process of its own: Ray reads its token once."""
    (tmp_path / ".ray").mkdir()
    if token:
        (tmp_path / ".ray" / "auth_token").write_text(token)
    server = dashboard_that_refuses()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env["http_proxy"] = "http://127.0.0.1:1"  # which is not to see the token
    env |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"} if token else {"HOME": str(tmp_path)}
    address = f"http://127.0.0.1:{server.server_port}"
    done = dpdl("train", "--address", address, "--dataset", "x", env=env)
    server.shutdown()
    assert done.returncode == 1
    told = " ".join(done.stderr.split())
    assert f"{address} {wanted}" in told
    assert "RAY_AUTH_TOKEN_PATH" in told
    assert "Traceback" not in told


def test_a_misspelt_option_of_the_command_is_refused_before_it_is_sent():
    done = dpdl("train", "--dataset", "x", "--wrokers", "2")
    assert done.returncode == 2
    assert "--wrokers" in done.stderr


def test_what_the_command_would_refuse_is_refused_before_it_is_sent():
    for words, says in [
        (["train"], "either --dataset NAME"),
        (["train", "--resume", "train-0", "--workers", "2"], "leave out --workers"),
        (["refresh", "--once", "--watch"], "choose one"),
        (["refresh", "--device", "cuda:1"], "take --device cuda"),
        (["train", "--dataset", "d", "--env", "DPDL_X"], "--env DPDL_X: wanted key=value"),
    ]:
        done = dpdl(*words, "--address", "http://127.0.0.1:9")
        assert done.returncode == 1
        assert says in done.stderr


@pytest.mark.parametrize(
    ("given", "sent", "gpus"),
    [
        (["--once"], ["--once", "--device", "cpu"], 0),
        (["--device", "cpu"], ["--device", "cpu"], 0),
        (["--device", "cuda"], ["--device", "cuda"], 0.75),
    ],
)
def test_a_refresh_takes_no_card_that_is_not_reserved(monkeypatch, given, sent, gpus):
    requests = []

    class Client:
        def submit_job(self, **request):
            requests.append(request)
            return "dpdl-refresh-1"

    def connect(self, address):
        self.address, self._client = address, Client()

    monkeypatch.setattr(Jobs, "__init__", connect)
    done = CliRunner().invoke(app, ["job", "refresh", *given, "--no-wait"])
    assert (done.exit_code, done.output.strip()) == (0, "dpdl-refresh-1")
    (request,) = requests
    assert request["entrypoint"].split() == ["python", "-m", "cluster.cli", "refresh", *sent]
    assert (request["entrypoint_num_cpus"], request["entrypoint_num_gpus"]) == (1, gpus)


class Cluster:
    """A job client: what each tail of the log does; the last is repeated."""

    def __init__(self, *tails, reachable=True):
        self.tails, self.reachable = list(tails), reachable

    async def tail_job_logs(self, job):
        self.ends = len(self.tails) == 1
        tail = self.tails[0] if self.ends else self.tails.pop(0)
        for step in tail:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    def get_job_info(self, job):
        if not self.reachable:
            raise ConnectionError("no route to host")
        done = JobStatus.SUCCEEDED if self.ends else JobStatus.RUNNING
        return type("Info", (), {"status": done, "message": ""})


def followed(cluster, monkeypatch):
    """What is shown of a job, with waits that a test has."""
    for name, value in {"RECONNECT_S": 0.2, "POLL_S": 0.01, "SILENCE_S": 0.4}.items():
        monkeypatch.setattr(jobs, name, value)
    one, shown = Jobs.__new__(Jobs), []
    one.address, one._client = "http://head:8265", cluster
    one.follow("dpdl-train-1", shown.append)
    return "".join(shown)


def test_a_connection_that_breaks_after_long_is_made_anew(monkeypatch):
    """Of a job that ran, or was silent, for longer than a cluster may be out of reach."""
    breaks = ["one\n", 0.3, ConnectionError("reset by peer")]
    assert followed(Cluster(breaks, breaks, ["one\n", "two\n"]), monkeypatch) == "one\ntwo\n"


def test_a_silent_job_is_asked_for_and_followed_on(monkeypatch):
    assert followed(Cluster(["one\n", 9.0], ["one\n", "two\n"]), monkeypatch) == "one\ntwo\n"


def test_a_head_that_closes_nothing_and_answers_nothing_is_out_of_reach(monkeypatch):
    with pytest.raises(ServiceUnavailable, match="dpdl-train-1 goes on"):
        followed(Cluster(["one\n", 9.0], [9.0], reachable=False), monkeypatch)
