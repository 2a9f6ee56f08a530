"""The whole streaming application on real services: Kafka in, Ray Serve, Redis and S3 out.

One tiny real model in three versions (two of them at another image size), scored again offline:
each result must be what the version that it names says of that frame.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import ray
from pydantic import SecretStr
from ray import serve

sys.path.insert(0, str(Path(__file__).parent))
from lines import HOSTILE, MODEL, check, fitted, promote, send, wait_scored, wait_version

from dpdl_core import artifact
from infra import ray_runtime
from infra.errors import AuthFailed, DataError, DpdlError, SettingsError
from infra.kafka_client import ensure_topics
from infra.messages import evidence_key
from infra.model_store import ModelStore
from infra.redis_client import ResultStore
from infra.s3_client import ensure_buckets
from infra.settings import load_settings
from serving import app
from serving.consume import CLOSE_S, DRAIN_S

pytestmark = pytest.mark.integration

QUIET_S, SWAP_S = 5.0, 3.0
FRAMES_PER_S = 20


@pytest.fixture(scope="module")
def versions():
    return {"v1": fitted(1, 64), "v2": fitted(2, 96), "v3": fitted(3, 64), "s1": fitted(4, 96)}


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for the module; it ends with it."""
    # Serve hears of lag every ten seconds; a test wants to see it act sooner.
    os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
    ray_runtime.connect()
    yield
    serve.shutdown()  # else the next module's Serve would look for this one's controller
    ray.shutdown()


@pytest.fixture(scope="module")
def port():
    """For the console; Ray Serve keeps to the first that it is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def prepared(settings, versions, port, monkeypatch):
    """Version v1 in use."""
    monkeypatch.setenv("DPDL_SERVE_HTTP_PORT", port)
    settings = load_settings()
    ensure_buckets(settings)
    store = ModelStore(settings)
    for version, files in versions.items():
        store.put_version(MODEL, version, files, {})
    promote(settings, "v1")
    return settings


@pytest.fixture
def deployed(prepared, cluster):
    """The application running."""
    try:
        yield prepared, app.deploy(prepared, model_name=MODEL, device="cpu")
    finally:
        app.shutdown()


def get(settings, path, host=None, **headers):
    url = f"http://127.0.0.1:{settings.serve.http_port}{path}"
    if host:
        headers["Host"] = host
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as r:
            return r.status, dict(r.headers), r.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def get_json(settings, path):
    status, _, body = get(settings, path)
    assert status == 200, body
    return json.loads(body)


def test_serve_ends_in_order_when_told_to(prepared, versions):
    """SIGTERM to `dpdl serve` in mid-stream: what is in flight is published, nothing is left."""
    settings, kafka = prepared, prepared.kafka
    ensure_topics(settings)
    results = ResultStore(settings)
    command = [sys.executable, "-m", "cluster.cli", "serve", "--model", MODEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        lines = iter(running.stdout.readline, "")
        assert any("v1 scores on cpu; " in line for line in lines)
        everything = psutil.Process(running.pid).children(recursive=True)
        logs = _ray_logs(everything)
        send(settings, 400, seed=1, bad_every=1000)
        running.send_signal(signal.SIGTERM)
        began = time.monotonic()
        rest = running.stdout.read()
        assert running.wait(timeout=60) == 0
    assert time.monotonic() - began < DRAIN_S + CLOSE_S + 10
    assert rest == "ending: what is in flight is published first\n"
    assert len(everything) > 5
    assert not psutil.wait_procs(everything, timeout=5)[1]
    assert sum(results.progress(kafka.group, kafka.topic).values()) > 0
    said = [line for path in logs.glob("worker-*.err") for line in path.read_text().splitlines()]
    assert any("batch {" in line for line in said)
    assert not any("to replay" in line for line in said)


def _ray_logs(processes):
    """Of the Ray that these processes are."""
    raylet = next(line for each in processes if "raylet/raylet" in (line := each.cmdline())[0])
    session = next(part for part in raylet if part.startswith("--session_dir="))
    return Path(session.removeprefix("--session_dir=")) / "logs"


def test_stream_swap_refuse_and_console(deployed, versions):
    settings, running = deployed
    assert running.version == "v1"

    # Bad records among good ones, then two more versions in mid-stream, one of another size.
    send(settings, 150, seed=1)
    wait_scored(settings)
    send(settings, 300, seed=2)
    promote(settings, "v2")
    wait_version("v2")
    send(settings, 100, seed=3)
    wait_scored(settings)

    # A version that was altered after it was stored, one with NaN weights, one with a tensor of
    # another shape, one from a newer format.
    store = ModelStore(settings)
    broken = {
        "shape": {**versions["v3"], artifact.WEIGHTS: _reshaped(versions["v3"][artifact.WEIGHTS])},
        "nan": {**versions["v3"], artifact.WEIGHTS: _with_nan(versions["v3"][artifact.WEIGHTS])},
        "newer": {**versions["v3"], artifact.CONFIG: b'{"format": 999}'},
        "altered": versions["v3"],
    }
    for version, files in broken.items():
        store.put_version(MODEL, version, files, {})
    _alter(settings, "altered")
    reasons = {"shape": "shape", "nan": "NaN", "newer": "999", "altered": "sha256"}
    for version, reason in reasons.items():
        promote(settings, version)
        until = time.monotonic() + 30
        while version not in (refused := app.scorer_info()["refused"]):
            assert time.monotonic() < until, f"{version} was not refused"
            time.sleep(0.2)
        assert reason in refused[version]
    assert app.scorer_info()["version"] == "v2"
    send(settings, 30, seed=4)
    promote(settings, "v3")
    wait_version("v3")
    send(settings, 30, seed=5)
    wait_scored(settings)

    got, dead = check(settings, versions)
    assert {result.version for result in got.values()} == {"v1", "v2", "v3"}
    assert set(dead) == {"truncated", "not-an-image", "no-key", "bad-key", "empty"}
    anomalies = [result for result in got.values() if result.is_anomaly]
    assert len(anomalies) > 50
    assert not any(result.camera == "cam-1" for result in anomalies)  # its own threshold: 1e9

    _check_overrides(settings)
    _check_console(settings, got)


def _with_nan(weights):
    import safetensors.torch

    state = safetensors.torch.load(weights)
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[0] = float("nan")
    return safetensors.torch.save(state)


def _reshaped(weights):
    import safetensors.torch

    state = safetensors.torch.load(weights)
    name = next(name for name, tensor in state.items() if tensor.ndim > 1)
    state[name] = state[name][:-1].contiguous()
    return safetensors.torch.save(state)


def _alter(settings, version):
    from io import BytesIO

    from infra.s3_client import make_minio

    make_minio(settings).put_object(
        settings.s3.models_bucket,
        f"{MODEL}/versions/{version}/{artifact.METRICS}",
        BytesIO(b"{}"),
        2,
    )


def _check_overrides(settings):
    """A person's threshold wins over the version's, from the next look on."""
    results = ResultStore(settings)
    results.set_threshold("cam-1", 0.0, by="test")
    time.sleep(2.5)
    send(settings, 8, seed=6, bad_every=1000)
    wait_scored(settings)
    newest = results.scores("cam-1", 1)[0].result
    assert newest.threshold == 0.0
    assert newest.is_anomaly == (newest.score > 0.0)


def _check_console(settings, got):
    results = ResultStore(settings)
    newest_first = [each.id for each in results.latest_alerts(10_000)]
    ids, before = [], ""
    while before is not None:
        page = get_json(settings, f"/api/v1/alerts?count=40&before={before}")
        ids += [alert["id"] for alert in page["alerts"]]
        before = page["older"]
    assert ids == newest_first
    page = get_json(settings, "/api/v1/alerts?count=3")
    fresh = get_json(settings, f"/api/v1/alerts?after={page['alerts'][2]['id']}")
    assert [alert["id"] for alert in fresh["alerts"]] == newest_first[:2]
    one = get_json(settings, "/api/v1/alerts?camera=cam-2&count=500")["alerts"]
    assert one
    assert {alert["camera"] for alert in one} == {"cam-2"}

    cameras = get_json(settings, "/api/v1/cameras")["cameras"]
    assert HOSTILE in {camera["camera"] for camera in cameras}
    status = get_json(settings, "/api/v1/status")
    assert status["scorer"]["version"] == "v3"
    assert status["consumer"]["trouble"] == ""
    assert set(status["waiting"]) == {str(p) for p in range(settings.kafka.partitions)}

    alert = next(a for a in one if a["frame_id"] in got)
    code, headers, frame = get(settings, f"/{alert['frame_url']}")
    assert code == 200
    assert headers["content-type"] == "image/jpeg"
    assert cv2.imdecode(np.frombuffer(frame, np.uint8), 1).shape == (80, 80, 3)
    code, headers, heat = get(settings, f"/{alert['heat_url']}")
    assert (code, headers["content-type"]) == (200, "image/png")
    assert cv2.imdecode(np.frombuffer(heat, np.uint8), cv2.IMREAD_UNCHANGED).shape[2] == 4

    code, headers, body = get(settings, "/")
    assert code == 200
    assert b"<title>DPDL" in body
    assert "default-src 'none'" in headers["content-security-policy"]
    assert get(settings, "/app.js")[0] == 200
    missing = evidence_key(f"{settings.kafka.topic}/0/999999", 1)
    assert get(settings, f"/api/v1/evidence/{missing}/frame")[0] == 404
    assert get(settings, "/api/v1/evidence/..%2F..%2Fx/0/0/frame")[0] in (404, 422)
    assert get(settings, "/api/v1/alerts?count=100000")[0] == 422
    assert get(settings, "/api/v1/alerts?before=DROP")[0] == 422
    assert get(settings, "/console.py")[0] == 404
    # DNS rebinding: a foreign name that leads here is not this machine.
    assert get(settings, "/api/v1/alerts", host="evil.example")[0] == 401
    assert get(settings, "/api/v1/alerts", **{"X-Forwarded-For": "10.0.0.1"})[0] == 401


def test_swapped_bound_stopped_and_scaled_in_mid_stream(deployed, versions, monkeypatch):
    settings, _ = deployed
    send(settings, 40, seed=0)  # the first frames pay for imports and caches
    wait_scored(settings)
    quiet = _paced(settings, QUIET_S, seed=1)
    swaps = [
        _paced(settings, SWAP_S, seed=seed, swap=version)
        for seed, version in enumerate(["v3", "v2", "v1", "v3"], 2)
    ]
    got, _ = check(settings, versions)
    assert {"v1", "v2", "v3"} <= {result.version for result in got.values()}
    _check_batches(got)
    # On a machine that does ten other things a lone stall says nothing: hence the floor, and what
    # half of the swaps take. A stall that is a swap's own comes with every one of them.
    swapping = statistics.median(_p99_s(got, each) for each in swaps)
    print(f"p99 {_p99_s(got, quiet):.3f} s quiet, {swapping:.3f} s while swapping")
    assert swapping < max(3 * _p99_s(got, quiet), 2.0)

    _check_bindings(settings, versions)
    _check_no_secret_is_seen(settings)
    _check_shutdown(settings)
    _check_scaling(settings, monkeypatch)
    check(settings, versions)


def _paced(settings, seconds, *, seed, swap=""):
    """Frames at a steady pace, a version made current amid them; (begin, end) by the clock."""
    begin = time.time_ns()
    sender = threading.Thread(
        target=send,
        args=(settings, int(seconds * FRAMES_PER_S)),
        kwargs={"seed": seed, "bad_every": 1000, "frames_per_s": FRAMES_PER_S},
    )
    sender.start()
    if swap:
        time.sleep(seconds / 2)
        promote(settings, swap)
        wait_version(swap)
    sender.join()
    wait_scored(settings)
    return begin, time.time_ns()


def _p99_s(got, span):
    begin, end = span
    waited = [
        (result.scored_at_ns - result.captured_at_ns) / 1e9
        for result in got.values()
        if begin <= result.captured_at_ns <= end
    ]
    assert len(waited) > 50
    return float(np.quantile(waited, 0.99))


def _check_batches(got):
    """The results of one call carry one time: all are by one version of one model."""
    batches = defaultdict(set)
    for result in got.values():
        batches[result.scored_at_ns].add((result.model, result.version))
    assert len(batches) < len(got)
    assert all(len(by) == 1 for by in batches.values())


def _check_bindings(settings, versions):
    """cam-2 by a model of another size, cam-3 by one that does not exist; then cam-2 freed."""
    results, store = ResultStore(settings), ModelStore(settings)
    store.put_version("special", "s1", versions["s1"], {})
    store.move_pointer("special", "s1", None, by="test", why="test")
    results.bind_model("cam-2", "special", by="test")
    results.bind_model("cam-3", "ghost", by="test")
    time.sleep(2.5)
    send(settings, 60, seed=3, bad_every=1000)
    wait_scored(settings)
    by = {cam: results.scores(cam, 1)[0].result for cam in ("cam-0", "cam-1", "cam-2", "cam-3")}
    assert (by["cam-2"].model, by["cam-2"].version) == ("special", "s1")
    assert {by[cam].model for cam in ("cam-0", "cam-1", "cam-3")} == {MODEL}
    info = app.scorer_info()
    assert set(info["models"]) == {MODEL, "special"}
    assert "no current version" in info["trouble"]["ghost"]
    results.bind_model("cam-2", None, by="test")
    time.sleep(2.5)
    send(settings, 30, seed=4, bad_every=1000)
    wait_scored(settings)
    assert results.scores("cam-2", 1)[0].result.model == MODEL
    got, _ = check(settings, versions)
    _check_batches(got)


def _check_no_secret_is_seen(settings):
    """What Ray's dashboard can show: actors, jobs, command lines and logs."""
    secrets = [
        value.get_secret_value().encode()
        for group in (settings.kafka, settings.redis, settings.s3, settings.serve)
        for _, value in group
        if isinstance(value, SecretStr)
    ]
    assert len(secrets) >= 2
    worker = ray._private.worker
    state = ray._private.state.state._connect_and_get_accessor()
    shown = [
        *state.get_actor_table(None, None),
        *state.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True),
    ]
    assert any(b"DPDL_STATE_DIR" in each for each in shown)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes()
        except OSError:  # it has ended
            continue
        if b"ray" in line:
            shown.append(line)
    logs = Path(worker._global_node.get_session_dir_path()) / "logs"
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert any(b"batch {" in path.read_bytes() for path in files)
    shown += [path.read_bytes() for path in files]
    assert not any(secret in each for secret in secrets for each in shown)


def _check_shutdown(settings):
    """Ended in mid-stream: soon, with what was in flight published, and nothing after that."""
    results, kafka = ResultStore(settings), settings.kafka
    before = sum(results.progress(kafka.group, kafka.topic).values())
    send(settings, 400, seed=5, bad_every=1000)
    began = time.monotonic()
    app.shutdown()
    assert time.monotonic() - began < DRAIN_S + CLOSE_S + 10
    stopped_at = results.progress(kafka.group, kafka.topic)
    assert before < sum(stopped_at.values())
    time.sleep(1.0)
    assert results.progress(kafka.group, kafka.topic) == stopped_at


def _check_scaling(settings, monkeypatch):
    """Deployed anew before a lag that one slow consumer cannot take: more of them come."""
    for name, value in {
        "SERVE_MAX_CONSUMERS": "3",
        "SERVE_LAG_PER_CONSUMER": "100",
        "STREAM_MAX_BATCH": "1",
        "STREAM_MAX_IN_FLIGHT": "1",
    }.items():
        monkeypatch.setenv(f"DPDL_{name}", value)
    send(settings, 2000, seed=6, bad_every=1000)
    app.deploy(load_settings(), model_name=MODEL, device="cpu")
    until = time.monotonic() + 60
    while app.consumers_running() < 2:
        assert time.monotonic() < until, "lag brought no further consumer"
        time.sleep(0.5)
    wait_scored(settings, 120)


def test_replicas_that_are_killed_lose_nothing(deployed, versions):
    """SIGKILL of the consumer's and of the scorer's process while frames stream."""
    settings, _ = deployed
    killed = []
    for asked in (app.consumer_stats, app.scorer_info):
        send(settings, 150, seed=len(killed), bad_every=25)
        pid = asked()["pid"]
        os.kill(pid, 9)
        killed.append(pid)
        send(settings, 150, seed=10 + len(killed), bad_every=25)
        wait_scored(settings, 90)
    assert len(set(killed)) == 2
    check(settings, versions)


def test_only_who_deployed_the_application_takes_it_down(deployed, monkeypatch):
    """Serve's controller begins anew in between: to it, the application is of that moment then."""
    settings, running = deployed
    assert running.device == "cpu"
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    app.check_ours()
    with monkeypatch.context() as another:
        another.setattr(app, "_US", "another process")
        app.shutdown()
        with pytest.raises(DpdlError, match="was replaced by a later deployment"):
            app.check_ours()
    app.check_ours()
    get_json(settings, "/api/v1/status")

    monkeypatch.setenv("DPDL_SERVE_HTTP_PORT", str(settings.serve.http_port + 1))
    with pytest.raises(SettingsError, match=r"stays there\. `serve shutdown -y` first"):
        app.deploy(load_settings(), model_name=MODEL)
    app.shutdown()
    with pytest.raises(DpdlError, match="was deleted"):
        app.check_ours()


def test_deploying_without_a_version_or_a_free_port_says_so(settings, cluster, monkeypatch):
    ensure_buckets(settings)
    with pytest.raises(DataError, match="no current version"):
        app.deploy(settings, model_name="nothing")
    monkeypatch.setenv("DPDL_SERVE_HTTP_HOST", "0.0.0.0")
    with pytest.raises(SettingsError, match=r"serve\.token"):
        app.deploy(load_settings(), model_name="nothing")


@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("DPDL_REDIS_PASSWORD", r"redis\.password"),
        ("DPDL_KAFKA_SASL_PASSWORD", r"kafka\.sasl_password"),
        ("DPDL_S3_SECRET_KEY", r"s3\.secret_key"),
    ],
)
def test_wrong_credentials_are_one_line_before_anything_starts(
    settings, monkeypatch, variable, setting
):
    monkeypatch.setenv(variable, "not-the-password")
    with pytest.raises(AuthFailed, match=setting) as raised:
        app.deploy(load_settings(), model_name=MODEL)
    assert "\n" not in str(raised.value)
    assert "not-the-password" not in str(raised.value)
