"""`dpdl dashboards push` and annotations, against a server that takes only what Grafana documents.

The server here knows the paths, methods, bodies and status codes of Grafana's HTTP API (11.6 to 13)
that we use, and refuses everything else; it adds what Grafana adds. With DPDL_GRAFANA_URL and
DPDL_GRAFANA_TOKEN set, the push runs on that Grafana too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from cluster.cli import app
from infra import decisions
from infra.dashboards import dashboards
from infra.decisions import Decision
from infra.errors import AuthFailed, DataError, ServiceUnavailable, SettingsError
from infra.grafana_client import Grafana, announce_move
from infra.model_store import ModelStore, Move, Pointer
from infra.s3_client import ensure_buckets
from infra.settings import load_settings
from pipelines.promotion import move

pytestmark = pytest.mark.integration

REAL_URL, REAL_TOKEN = (os.environ.get(f"DPDL_GRAFANA_{name}", "") for name in ("URL", "TOKEN"))
TOKEN = "glsa_for-this-test-only"
SOURCES = {
    "prometheus_url": "http://prometheus:9090",
    "alert_api_url": "http://console:8000",
    "console_url": "https://console.plant",
    "alert_api_token": "secret of the alert API",
}

TEXT = {"type": "string", "minLength": 1}
UID = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"}


def closed(required: list[str], **properties) -> Draft202012Validator:
    """An object with these properties and no others."""
    return Draft202012Validator(
        {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    )


SOURCE = closed(
    ["name", "type", "access"],
    name=TEXT, uid=UID, type=TEXT, url=TEXT, access={"enum": ["proxy", "direct"]},
    jsonData={"type": "object"},
    secureJsonData={"type": "object", "additionalProperties": TEXT},
    isDefault={"type": "boolean"}, basicAuth={"type": "boolean"}, database={"type": "string"},
    user={"type": "string"}, withCredentials={"type": "boolean"}, version={"type": "integer"},
    id={"type": "integer"}, orgId={"type": "integer"},
)  # fmt: skip
DASHBOARD = {
    "type": "object",
    "required": ["title", "schemaVersion", "panels"],
    "properties": {
        "id": {"type": ["null", "integer"]},
        "uid": UID,
        "title": TEXT,
        "refresh": {"type": "string"},
        "schemaVersion": {"type": "integer", "minimum": 36, "maximum": 42},
        "tags": {"type": "array", "items": TEXT},
        "panels": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "type", "title", "gridPos", "datasource", "targets"],
                "properties": {
                    "gridPos": {
                        "type": "object",
                        "required": ["x", "y", "w", "h"],
                        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 500},
                    },
                    "datasource": {"type": "object", "required": ["type", "uid"]},
                },
            },
        },
    },
}
BODIES = {
    ("POST", "folders"): closed(["title"], title=TEXT, uid=UID, parentUid=UID),
    ("PUT", "folders/:uid"): closed(
        ["title"], title=TEXT, version={"type": "integer"}, overwrite={"type": "boolean"}
    ),
    ("POST", "datasources"): SOURCE,
    ("PUT", "datasources/uid/:uid"): SOURCE,
    ("POST", "dashboards/db"): closed(
        ["dashboard"], dashboard=DASHBOARD, folderUid=UID, message={"type": "string"},
        overwrite={"type": "boolean"},
    ),
    ("POST", "annotations"): closed(
        ["text"], text=TEXT, time={"type": "integer", "minimum": 10**12},
        timeEnd={"type": "integer"}, tags={"type": "array", "items": TEXT}, dashboardUID=UID,
        panelId={"type": "integer"},
    ),
}  # fmt: skip
GETS = ("folders/:uid", "datasources/uid/:uid", "dashboards/uid/:uid")


class FakeGrafana(ThreadingHTTPServer):
    """Keeps folders, data sources, dashboards and annotations as Grafana answers for them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folders, self.sources, self.boards = {}, {}, {}
        self.annotations, self.writes, self.complaints = [], [], []
        self.provisioned = False
        self.answer_after_s = 0.0

    def handle_call(self, method: str, path: str, body) -> tuple[int, object]:
        route, uid = _route(path)
        if method == "GET" and route in GETS:
            return self._get(route, uid)
        schema = BODIES.get((method, route))
        if schema is None:
            return 404, {"message": "Not found"}
        if errors := [f"{e.json_path}: {e.message}" for e in schema.iter_errors(body)]:
            return 400, {"message": f"bad request data: {errors[0]}"}
        self.writes.append(f"{method} {path}")
        return self._write(route, uid, body)

    def _get(self, route, uid):
        kept = {"folders/:uid": self.folders, "datasources/uid/:uid": self.sources}
        found = kept.get(route, self.boards).get(uid)
        return (200, found) if found else (404, {"message": "Not found"})

    def _write(self, route, uid, body):
        if route.startswith("folders"):
            if route == "folders" and body.get("uid") in self.folders:
                return 412, {"message": "a folder with that uid exists"}
            uid = uid or body["uid"]
            self.folders[uid] = {"id": 1, "uid": uid, "title": body["title"], "version": 1}
            return 200, self.folders[uid]
        if route.startswith("datasources"):
            return self._write_source(route, uid, body)
        if route == "annotations":
            self.annotations.append(body)
            return 200, {"message": "Annotation added", "id": len(self.annotations)}
        return self._write_board(body)

    def _write_source(self, route, uid, body):
        uid = uid or body["uid"]
        if route == "datasources" and uid in self.sources:
            return 409, {"message": "data source with the same uid already exists"}
        if route != "datasources" and uid not in self.sources:
            return 404, {"message": "Data source not found"}
        secrets = {name: True for name in body.pop("secureJsonData", {})}
        self.sources[uid] = body | {"id": 7, "secureJsonFields": secrets, "readOnly": False}
        return 200, {"datasource": self.sources[uid], "id": 7, "message": "saved"}

    def _write_board(self, body):
        board, there = body["dashboard"], self.boards.get(body["dashboard"]["uid"])
        if body.get("folderUid") and body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        if self.provisioned:
            return 400, {"message": "Cannot save provisioned dashboard"}
        if there and not body.get("overwrite"):
            return 412, {"message": "version mismatch", "status": "version-mismatch"}
        ids = [panel["id"] for panel in board["panels"]]
        if len(set(ids)) != len(ids):
            return 400, {"message": "panel ids repeat"}
        version = there["dashboard"]["version"] + 1 if there else 1
        kept = board | {"id": 11, "version": version, "schemaVersion": 42, "preload": False}
        meta = {"folderUid": body.get("folderUid", ""), "provisioned": self.provisioned}
        self.boards[board["uid"]] = {"dashboard": kept, "meta": meta}
        return 200, {"id": 11, "uid": board["uid"], "status": "success", "version": version}


def _route(path: str) -> tuple[str, str]:
    for prefix in ("folders", "datasources/uid", "dashboards/uid"):
        if match := re.fullmatch(rf"/api/({prefix})/([^/]+)", path):
            return f"{prefix}/:uid", match[2]
    return path.removeprefix("/api/"), ""


class _Handler(BaseHTTPRequestHandler):
    server: FakeGrafana

    def _answer(self) -> None:
        time.sleep(self.server.answer_after_s)
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        status, content = self._judged(raw)
        if status in (400, 405, 415):
            self.server.complaints.append((self.command, self.path, content))
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _judged(self, raw: bytes):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key"}
        if raw and not self.headers.get("Content-Type", "").startswith("application/json"):
            return 415, {"message": "JSON is wanted"}
        body = json.loads(raw) if raw else None
        return self.server.handle_call(self.command, urlsplit(self.path).path, body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    fake = FakeGrafana()
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()


def test_a_push_creates_everything_and_a_second_one_changes_nothing(server) -> None:
    grafana = Grafana(server.url, TOKEN)
    first = grafana.push(**SOURCES)
    assert len(first.created) == 1 + 2 + 4
    assert (first.updated, first.unchanged) == ([], [])
    assert set(server.boards) == {"dpdl-wall", "dpdl-camera", "dpdl-model", "dpdl-pipeline"}
    assert {b["meta"]["folderUid"] for b in server.boards.values()} == {"dpdl"}
    wall = server.boards["dpdl-wall"]["dashboard"]
    assert wall["templating"]["list"][0]["current"]["value"] == "https://console.plant"
    infinity = server.sources["dpdl-alert-api"]
    assert infinity["secureJsonFields"] == {"bearerToken": True}
    assert SOURCES["alert_api_token"] not in json.dumps(infinity)
    plain = hashlib.sha256(SOURCES["alert_api_token"].encode()).hexdigest()[:8]
    assert plain not in json.dumps(infinity)  # viewers could try words against it

    server.writes.clear()
    second = grafana.push(**SOURCES)
    assert second.unchanged == first.created
    assert (server.writes, second.created, second.updated) == ([], [], [])
    assert server.complaints == []


def test_what_people_changed_is_put_back_and_nothing_else(server) -> None:
    grafana = Grafana(server.url, TOKEN)
    grafana.push(**SOURCES)
    server.boards["dpdl-model"]["dashboard"]["panels"][0]["title"] = "mine"
    server.boards["dpdl-wall"]["meta"]["folderUid"] = ""
    server.sources["dpdl-prometheus"]["url"] = "http://elsewhere:9090"
    server.folders["dpdl"]["title"] = "Mine"
    pushed = grafana.push(**SOURCES)
    assert pushed.updated == [
        "folder DPDL", "data source DPDL Prometheus", "dashboard DPDL Wall",
        "dashboard DPDL Model",
    ]  # fmt: skip
    assert server.boards["dpdl-model"]["dashboard"]["version"] == 2
    assert server.boards["dpdl-camera"]["dashboard"]["version"] == 1
    assert grafana.push(**(SOURCES | {"alert_api_token": "another"})).updated == [
        "data source DPDL alert API"
    ]
    assert server.complaints == []


def test_a_wrong_token_a_dead_server_and_a_wrong_url_say_so(server) -> None:
    with pytest.raises(AuthFailed, match="role Admin"):
        Grafana(server.url, "wrong").push(**SOURCES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        Grafana(gone, TOKEN).push(**SOURCES)
    with pytest.raises(SettingsError, match="HOST"):
        Grafana("grafana:3000", TOKEN)
    with pytest.raises(SettingsError, match="DPDL_GRAFANA_TOKEN_FILE"):
        Grafana(server.url, "")


def test_dashboards_from_files_are_not_pushed_over(server) -> None:
    grafana = Grafana(server.url, TOKEN)
    grafana.push(**SOURCES)
    wall = server.boards["dpdl-wall"]
    wall["meta"]["provisioned"] = True
    wall["dashboard"]["title"] = "older"
    with pytest.raises(DataError, match="provisioning file"):
        grafana.push(**SOURCES)


@contextmanager
def configured(monkeypatch, tmp_path, url: str):
    for name in [name for name in os.environ if name.startswith("DPDL_")]:
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("DPDL_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("DPDL_GRAFANA_URL", url)
    monkeypatch.setenv("DPDL_GRAFANA_TOKEN_FILE", str(tmp_path / "token"))
    yield load_settings()


def test_the_command_pushes_by_settings_and_by_flags(server, monkeypatch, tmp_path) -> None:
    with configured(monkeypatch, tmp_path, server.url):
        done = CliRunner().invoke(app, ["dashboards", "push"])
        assert done.exit_code == 0, done.output
        assert done.output.count("created") == 7
        assert TOKEN not in done.output
        flags = ["--url", server.url, "--token-file", str(tmp_path / "token")]
        done = CliRunner().invoke(app, ["dashboards", "push", *flags])
        assert done.output.count("unchanged") == 7
        done = CliRunner().invoke(app, ["dashboards", "push", "--url", server.url, "--token", "no"])
        assert isinstance(done.exception, AuthFailed)
    assert server.complaints == []


def pointer(*versions: str, back: bool = False) -> Pointer:
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    moves = tuple(
        Move(version=v, at=at, by="me@here", why="AUROC up", nonce="n", back=back) for v in versions
    )
    previous = versions[-2] if len(versions) > 1 else None
    return Pointer(
        version=versions[-1], previous=previous, promoted_at=at, by="me@here", why="AUROC up",
        etag="e", moves=moves,
    )  # fmt: skip


def test_promotions_and_rollbacks_are_annotated(server, monkeypatch, tmp_path) -> None:
    with configured(monkeypatch, tmp_path, server.url) as settings:
        for moves in (["v1"], ["v1", "v2"]):
            announce_move(settings, "lines", pointer(*moves))
        announce_move(settings, "lines", pointer("v1", "v2", "v1", back=True))
        announce_move(settings, "lines", pointer("v1", "v2", "v1"))  # by a person's wish
    first, second, third, fourth = server.annotations
    assert first["text"].startswith("promotion of lines: none -> v1")
    assert second["tags"] == ["dpdl", "version", "promotion", "lines"]
    assert third["text"] == "rollback of lines: v2 -> v1\nAUROC up (me@here)"
    assert fourth["text"].startswith("promotion of lines: v2 -> v1")
    assert abs(third["time"] / 1000 - time.time()) < 10
    # What the dashboards look for.
    (shown,) = [a for a in dashboards()["model"]["annotations"]["list"] if a["name"] == "Versions"]
    assert set(shown["target"]["tags"]) <= set(second["tags"])
    assert server.complaints == []


def test_a_move_and_a_held_candidate_are_annotated(server, settings, monkeypatch, tmp_path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("DPDL_GRAFANA_URL", server.url)
    monkeypatch.setenv("DPDL_GRAFANA_TOKEN_FILE", str(tmp_path / "token"))
    settings = load_settings()
    ensure_buckets(settings)
    store = ModelStore(settings)
    store.put_version("lines", "v1", {"weights": b"1"}, {})
    promoted = move(settings, store, "lines", "v1", None, "the first version")
    again = move(settings, store, "lines", "v1", None, "another process was first")
    assert again.etag == promoted.etag
    held = Decision("v2", "v1", "held", "AUROC .90 -> .85", {}, {})
    decisions.record(settings, "lines", held)
    decisions.record(settings, "lines", held)
    decisions.record(settings, "lines", replace(held, candidate="v3", decision="promoted"))
    one, two = server.annotations
    assert one["text"].startswith("promotion of lines: none -> v1\nthe first version (")
    assert two["text"] == "lines: the gate held v2\nAUROC .90 -> .85"
    assert two["tags"] == ["dpdl", "version", "held", "lines"]
    assert server.complaints == []


def test_a_promotion_never_waits_long_or_fails_for_grafana(server, monkeypatch, tmp_path) -> None:
    server.answer_after_s = 60
    with configured(monkeypatch, tmp_path, server.url) as settings:
        began = time.monotonic()
        announce_move(settings, "lines", pointer("v1"))
        assert time.monotonic() - began < 4
    with configured(monkeypatch, tmp_path, "http://127.0.0.1:1") as settings:
        announce_move(settings, "lines", pointer("v1"))


@pytest.mark.skipif(
    not (REAL_URL and REAL_TOKEN), reason="no Grafana: set DPDL_GRAFANA_URL and DPDL_GRAFANA_TOKEN"
)
def test_a_real_grafana_takes_it_and_a_second_time_changes_nothing() -> None:
    grafana = Grafana(REAL_URL, REAL_TOKEN)
    grafana.push(**SOURCES)
    again = grafana.push(**SOURCES)
    assert (again.created, again.updated) == ([], [])
    grafana.annotate("a test of dpdl", datetime.now(UTC), ["dpdl", "version", "test"])
