"""Console: one page and a small JSON API over what the stream left in Redis and S3.

Reads only. Everything is bounded: pages by count, evidence by size, waits by time. Camera ids and
topics are hostile input: they are JSON here and text nodes in the page, never markup.
"""

# Serve pickles the FastAPI application when it decorates Console, by value, with what the module
# holds by then. So Console comes last in this file, and annotations are no strings (no
# `from __future__ import annotations`): their names could not be looked up any more.
import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from infra.errors import DpdlError
from infra.metrics import ReplicaMetrics
from infra.redis_client import CameraState, ResultStore, StoredResult
from infra.settings import load_settings
from serving.archive import FRAME, HEAT, EvidenceBucket, image_type
from serving.console.access import COOKIE, Access
from serving.logs import log_to_stderr
from serving.watch import Watch

log = logging.getLogger("dpdl.console")

MAX_PAGE = 500
MAX_SCANNED = 5_000
"""Alerts looked through for those of one camera, per request; the page says where to go on."""
MAX_CAMERAS = 2_000
MAX_LOGIN_BYTES = 4_096
STATUS_S = 5.0

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
STATIC = {"console.js": "text/javascript; charset=utf-8", "console.css": "text/css; charset=utf-8"}

StreamId = Annotated[str, Query(pattern=r"^\d{1,20}-\d{1,20}$|^$", description="A stream id.")]
Count = Annotated[int, Query(ge=1, le=MAX_PAGE)]
CameraId = Annotated[str, Query(max_length=128)]

api = FastAPI(
    title="DPDL alerts",
    version="1",
    docs_url=None,  # FastAPI's pages load scripts from elsewhere
    redoc_url=None,
    openapi_url="/api/v1/openapi.json",
)


@api.middleware("http")
async def _guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    access: Access = request.app.state.access
    open_to_all = request.url.path in ("/login", "/console.css")
    client = request.client.host if request.client else None
    response: Response
    if open_to_all or access.allows(client, request.headers, request.cookies):
        response = await go_on(request)
    elif request.url.path == "/":
        response = HTMLResponse(_page("login.html"), status_code=401)
    else:
        response = JSONResponse({"detail": "a token is needed: Authorization: Bearer"}, 401)
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@api.exception_handler(DpdlError)
async def _unavailable(request: Request, error: DpdlError) -> JSONResponse:
    log.warning("%s: %s", request.url.path, error)
    return JSONResponse({"detail": type(error).__name__}, 503 if error.retryable else 500)


async def _asked(answer: Any) -> Any:
    """A replica's answer, or an empty one that says why."""
    try:
        return await asyncio.wait_for(answer, STATUS_S)
    except Exception as error:  # restarting, overloaded, away: the page says so and asks again
        return {"trouble": f"no answer ({type(error).__name__})"}


def _page(name: str) -> bytes:
    return (files("serving.console") / name).read_bytes()


def _is_picture(data: bytes) -> bool:
    return image_type(data).startswith("image/")


def _of(stored: StoredResult, camera: str) -> bool:
    return not camera or stored.result.camera == camera


def _alert(stored: StoredResult) -> dict[str, Any]:
    result = stored.result
    evidence = f"api/v1/evidence/{quote(result.evidence_key)}" if result.evidence_key else ""
    return {
        "id": stored.id,
        "frame_id": result.frame_id,
        "camera": result.camera,
        # Milliseconds: nanoseconds do not fit a number of JavaScript.
        "captured_at_ms": result.captured_at_ns / 1e6,
        "scored_at_ms": result.scored_at_ns / 1e6,
        "score": result.score,
        "threshold": result.threshold,
        "energy": result.energy,
        "model": result.model,
        "version": result.version,
        "frame_url": f"{evidence}/{FRAME}" if evidence else None,
        "heat_url": f"{evidence}/{HEAT}" if evidence else None,
    }


def _camera(state: CameraState) -> dict[str, Any]:
    return {
        "camera": state.camera,
        "frames": state.frames,
        "anomalies": state.anomalies,
        "alerts": state.alerts,
        "last_captured_at_ms": _ms(state.last_captured_at_ns),
        "last_scored_at_ms": _ms(state.last_scored_at_ns),
        "last_score": state.last_score,
        "threshold": state.threshold_used,
        "override": state.override.threshold if state.override else None,
        "model": state.model,
        "version": state.version,
    }


def _ms(at_ns: int | None) -> float | None:
    return None if at_ns is None else at_ns / 1e6


@serve.ingress(api)
class Console:
    """The deployment's class.

    Args:
        consumer: for its state; one of the replicas answers.
        scorer: for the version in use.
        model_name: which model's refreshes are counted.
    """

    def __init__(
        self, consumer: DeploymentHandle[Any], scorer: DeploymentHandle[Any], model_name: str
    ) -> None:
        log_to_stderr()
        settings = load_settings()
        token = settings.serve.token
        api.state.access = Access(token.get_secret_value() if token else None)
        self._results = ResultStore(settings)
        self._evidence = EvidenceBucket(settings)
        self._consumer, self._scorer = consumer, scorer
        replica = ReplicaMetrics("console", serve.get_replica_context().rank.rank)
        self._watch = Watch(settings, self._results, model_name, replica)

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page(self) -> HTMLResponse:
        return HTMLResponse(_page("index.html"))

    @api.get("/{name}.{kind}", include_in_schema=False)
    def static(self, name: str, kind: str) -> Response:
        asked = f"{name}.{kind}"
        if asked not in STATIC:
            raise HTTPException(404)
        return Response(_page(asked), media_type=STATIC[asked])

    @api.post("/login", include_in_schema=False)
    async def login(self, request: Request) -> Response:
        access: Access = api.state.access
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_LOGIN_BYTES:
                raise HTTPException(413)
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        session = access.session()
        if session is None or not access.is_token(given):
            await asyncio.sleep(1)  # guessing costs time
            return HTMLResponse(_page("login.html"), status_code=401)
        answer = RedirectResponse(request.scope.get("root_path", "") + "/", status_code=303)
        answer.set_cookie(
            COOKIE, session, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return answer

    @api.get("/api/v1/alerts")
    def alerts(
        self, count: Count = 50, before: StreamId = "", after: StreamId = "", camera: CameraId = ""
    ) -> dict[str, Any]:
        """Alerts, newest first.

        `before` pages back from `older`; `after` asks for what came since `newest`, and `skipped`
        says that more came than fit. `camera` keeps those of one camera.
        """
        if before and after:
            raise HTTPException(422, "before and after exclude each other")
        if after:
            fresh = self._results.alerts(after, MAX_PAGE)
            return {
                "alerts": [_alert(each) for each in reversed(fresh) if _of(each, camera)],
                "newest": fresh[-1].id if fresh else after,
                "older": None,
                "skipped": len(fresh) == MAX_PAGE,
            }
        found, older, first = self._back(count, before, camera)
        return {
            "alerts": [_alert(each) for each in found],
            "newest": first or "0-0",
            "older": older,
            "skipped": False,
        }

    @api.get("/api/v1/cameras")
    def cameras(self) -> dict[str, Any]:
        """Cameras ever seen or configured, the latest seen first; at most MAX_CAMERAS."""
        known = self._results.cameras()
        return {"cameras": [_camera(each) for each in known[:MAX_CAMERAS]], "known": len(known)}

    @api.get("/api/v1/evidence/{topic}/{partition}/{offset}/{name}", response_class=Response)
    def evidence(
        self,
        topic: Annotated[str, Path(pattern=r"^[A-Za-z0-9._-]{1,249}$")],
        partition: Annotated[str, Path(pattern=r"^\d{1,10}$")],
        offset: Annotated[str, Path(pattern=r"^\d{1,20}$")],
        name: Annotated[str, Path(pattern=f"^({FRAME}|{HEAT})$")],
    ) -> Response:
        """The frame as it came, or its heat map as an overlay (RGBA PNG)."""
        data = self._evidence.get(f"{topic}/{partition}/{offset}/{name}")
        if data is None:
            raise HTTPException(404, "no such evidence: expired, or not yet in S3")
        return Response(
            data,
            media_type=image_type(data),
            headers={
                "Cache-Control": "private, max-age=86400, immutable",
                # What is no known picture is never shown in the page's origin.
                "Content-Disposition": "inline" if _is_picture(data) else "attachment",
            },
        )

    @api.get("/api/v1/status")
    async def status(self) -> dict[str, Any]:
        """The version in use, refused versions, one consumer's totals, dead letters."""
        scorer, consumer, dead = await asyncio.gather(
            _asked(self._scorer.info.remote()),
            _asked(self._consumer.stats.remote()),
            asyncio.to_thread(self._results.dead_letters),
        )
        return {"scorer": scorer, "consumer": consumer, "dead_letters": dead}

    def check_health(self) -> None:
        """Healthy while it can be asked: Redis or S3 being away is no fault of this replica."""

    def _back(
        self, count: int, before: str, camera: str
    ) -> tuple[list[StoredResult], str | None, str | None]:
        """A page back in time: alerts, where it goes on, the newest id looked at."""
        found: list[StoredResult] = []
        scanned, newest = 0, None
        while len(found) < count and scanned < MAX_SCANNED:
            size = count if not camera else MAX_PAGE
            page = self._results.latest_alerts(size, before or None)
            newest = newest or (page[0].id if page else None)
            scanned += len(page)
            for each in page:
                before = each.id
                if _of(each, camera):
                    found.append(each)
                    if len(found) == count:
                        break
            if len(page) < size and len(found) < count:
                return found, None, newest
        return found, before, newest
