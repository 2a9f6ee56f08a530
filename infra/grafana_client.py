"""Grafana by its HTTP API: folder, data sources and dashboards; annotations of versions.

Over grafana-client, the maintained successor of grafana-api. Grafana 11.6 to 13: the classic API
under /api, which all of them answer. The token is a service account's with the role Admin (data
sources need it) for push, Editor is enough for annotations.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import niquests
from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaClientError, GrafanaException, GrafanaTimeoutError

from infra.dashboards import dashboards
from infra.dashboards.panels import Json
from infra.dashboards.provisioning import FOLDER, FOLDER_UID, data_sources
from infra.errors import AuthFailed, DataError, DpdlError, ServiceUnavailable, SettingsError
from infra.model_store import Pointer
from infra.settings import Settings

log = logging.getLogger("dpdl.grafana")

TIMEOUT_S = 5.0
ANNOTATE_S = 3.0
"""Longest that a promotion waits for its annotation."""
MESSAGE = "dpdl dashboards push"


@dataclass(frozen=True)
class Pushed:
    """What a push did, by name."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


class Grafana:
    """One Grafana.

    Every method can raise AuthFailed, ServiceUnavailable and DataError.

    Args:
        url: http(s)://HOST[:PORT][/PREFIX]; SettingsError for anything else.
        token: of a service account.
    """

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise SettingsError(f"grafana.url={url}: wanted http(s)://HOST[:PORT][/PREFIX]")
        if not token:
            raise SettingsError(
                "no token for Grafana: set DPDL_GRAFANA_TOKEN_FILE (Administration, Service "
                "accounts, role Admin)"
            )
        prefix = parts.path.strip("/")
        self._where = f"Grafana at {parts.scheme}://{parts.netloc}"
        base = f"{parts.scheme}://{parts.netloc}/" + (f"{prefix}/" if prefix else "")
        self._key = token.encode()
        self._api = GrafanaApi.from_url(base, credential=token, timeout=TIMEOUT_S)

    def push(
        self,
        *,
        prometheus_url: str,
        alert_api_url: str,
        console_url: str,
        alert_api_token: str | None = None,
    ) -> Pushed:
        """Create or update folder, data sources and dashboards; what is as it should be is left.

        prometheus_url and alert_api_url are Grafana's ways there, console_url is the browser's.
        """
        pushed = Pushed()
        with self._errors():
            self._push_folder(pushed)
            for source in data_sources(prometheus_url, alert_api_url, alert_api_token):
                self._push_source(source, pushed)
            for board in dashboards(console_url).values():
                self._push_dashboard(board, pushed)
        return pushed

    def annotate(self, text: str, at: datetime, tags: list[str]) -> None:
        """One annotation of the whole organisation, found by its tags."""
        at_ms = int(at.timestamp() * 1000)
        with self._errors():
            self._api.client.POST("/annotations", json={"time": at_ms, "tags": tags, "text": text})

    def _push_folder(self, pushed: Pushed) -> None:
        there = _or_none(lambda: self._api.folder.get_folder(FOLDER_UID))
        if there is None:
            self._api.folder.create_folder(FOLDER, uid=FOLDER_UID)
            pushed.created.append(f"folder {FOLDER}")
        elif there["title"] != FOLDER:
            self._api.folder.update_folder(FOLDER_UID, title=FOLDER, overwrite=True)
            pushed.updated.append(f"folder {FOLDER}")
        else:
            pushed.unchanged.append(f"folder {FOLDER}")

    def _push_source(self, source: Json, pushed: Pushed) -> None:
        name, uid = f"data source {source['name']}", source["uid"]
        if secret := source.get("secureJsonData"):
            # Grafana never gives a secret back: by this a changed one is noticed. Whoever may look
            # at data sources can read it, so it is keyed by what only an administrator has.
            told = "".join(secret.values()).encode()
            digest = hmac.digest(self._key, told, "sha256").hex()[:12]
            source = source | {"jsonData": source["jsonData"] | {"secretDigest": digest}}
        there = _or_none(lambda: self._api.datasource.get_datasource_by_uid(uid))
        if there is None:
            self._api.datasource.create_datasource(source)
            pushed.created.append(name)
        elif _within({k: v for k, v in source.items() if k != "secureJsonData"}, there):
            pushed.unchanged.append(name)
        elif there.get("readOnly"):
            raise DataError(_provisioned(name))
        else:
            self._api.datasource.update_datasource_by_uid(uid, source)
            pushed.updated.append(name)

    def _push_dashboard(self, board: Json, pushed: Pushed) -> None:
        name = f"dashboard {board['title']}"
        there = _or_none(lambda: self._api.dashboard.get_dashboard(board["uid"]))
        if there is not None:
            meta = there["meta"]
            if meta.get("folderUid") == FOLDER_UID and _within(board, there["dashboard"]):
                pushed.unchanged.append(name)
                return
            if meta.get("provisioned"):
                raise DataError(_provisioned(name))
        body = {"dashboard": board, "folderUid": FOLDER_UID, "message": MESSAGE, "overwrite": True}
        self._api.dashboard.update_dashboard(body)
        (pushed.created if there is None else pushed.updated).append(name)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """grafana-client's errors, and those of the HTTP library beneath it, as ours."""
        try:
            yield
        except GrafanaException as error:
            raise self._translated(error) from error
        except niquests.exceptions.RequestException as error:
            why = type(error).__name__
            raise ServiceUnavailable(f"{self._where} does not answer ({why})") from error

    def _translated(self, error: GrafanaException) -> DpdlError:
        said = " ".join(str(error.message).split())[:300]
        if error.status_code in (401, 403):
            return AuthFailed(
                f"{self._where} refused the token ({said}): a service account's token with the "
                "role Admin is wanted (DPDL_GRAFANA_TOKEN_FILE)"
            )
        if isinstance(error, GrafanaTimeoutError) or error.status_code >= 500:
            return ServiceUnavailable(f"{self._where} answered {error.status_code} ({said})")
        return DataError(f"{self._where} answered {error.status_code} ({said})")


def announce_move(settings: Settings, model: str, pointer: Pointer) -> None:
    """Annotate a promotion or rollback in Grafana, where one is configured. Never raises."""
    kind = "rollback" if pointer.moves[-1].back else "promotion"
    text = f"{kind} of {model}: {pointer.previous or 'none'} -> {pointer.version}"
    text += f"\n{pointer.why} ({pointer.by})"
    _announce(settings, text, pointer.promoted_at, kind, model)


def announce_held(settings: Settings, model: str, candidate: str, why: str, at: str) -> None:
    """Annotate that the gate held a candidate, where a Grafana is configured. Never raises."""
    _announce(settings, f"{model}: the gate held {candidate}\n{why}", at, "held", model)


def _announce(settings: Settings, text: str, at: str, kind: str, model: str) -> None:
    """What is told has happened: what goes wrong here is logged, and ANNOTATE_S is all it takes."""
    where = settings.grafana
    if not where.url or where.token is None:
        return
    token = where.token.get_secret_value()

    def write() -> None:
        try:
            tags = ["dpdl", "version", kind, model]
            Grafana(where.url, token).annotate(text, datetime.fromisoformat(at), tags)
        except Exception as error:
            log.warning("the %s of %s is not annotated in Grafana: %s", kind, model, error)

    # A thread: no timeout of the HTTP library covers a name that does not resolve.
    thread = threading.Thread(target=write, name="annotate", daemon=True)
    thread.start()
    thread.join(ANNOTATE_S)


def _or_none(get: Callable[[], Any]) -> Any:
    try:
        found = get()
        if not isinstance(found, dict):
            raise DataError("what answers there is no Grafana: check grafana.url and its prefix")
        return found
    except GrafanaClientError as error:
        if error.status_code == 404:
            return None
        raise


def _within(ours: Any, theirs: Any) -> bool:
    """Whether theirs says all that ours says; Grafana adds defaults, ids and its schemaVersion."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(
            key in theirs and _within(value, theirs[key])
            for key, value in ours.items()
            if key != "schemaVersion"
        )
    if isinstance(ours, list):
        return (
            isinstance(theirs, list)
            and len(ours) == len(theirs)
            and all(_within(*pair) for pair in zip(ours, theirs, strict=True))
        )
    return bool(ours == theirs)


def _provisioned(name: str) -> str:
    return (
        f"{name} of this Grafana comes from a provisioning file (infra/grafana) and cannot be "
        "pushed over: change the file there, or push to another Grafana"
    )
