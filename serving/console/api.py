"""Console: the pages, and a JSON API over what the stream left in Redis and S3.

Everything is bounded: pages by count, evidence by size, waits by time. Camera ids and topics are
hostile input: they are JSON here and text nodes in the pages, never markup. What changes something
(answers, thresholds, promotions) says who, and is refused to pages from elsewhere (access.py).
"""

# Serve pickles the FastAPI application when it decorates Console, by value, with what the module
# holds by then. So Console comes last in this file, and annotations are no strings (no
# `from __future__ import annotations`): their names could not be looked up any more.
import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from infra.cameras import CameraState
from infra.errors import DataError, DpdlError, NotFound, PointerConflict, ServiceUnavailable
from infra.messages import frame_id
from infra.metrics import ReplicaMetrics
from infra.redis_client import ResultStore, StoredResult
from infra.settings import load_settings
from serving.archive import FRAME, HEAT, EvidenceBucket
from serving.console import lookup, pages, schema, views
from serving.console.access import COOKIE, Access, refused_change
from serving.console.desk import Desk
from serving.console.parameters import (
    CHANGES,
    MAX_PAGE,
    MISSING,
    PICTURE,
    PROBLEMS,
    CameraFilter,
    CameraId,
    Count,
    EntryId,
    Expected,
    FromMs,
    Kept,
    ModelFilter,
    Partition,
    StreamId,
    ToMs,
    Topic,
    VersionId,
)
from serving.logs import log_to_stderr
from serving.watch import Watch

log = logging.getLogger("dpdl.console")

MAX_CAMERAS = 2_000
MAX_BODY_BYTES = 4_096
STATUS_S = 5.0
LOGINS = 8
"""At once; more are refused. A wrong one takes its second, and holds none of the slots meanwhile
that those who are let in need (serving/app.py)."""
LOGIN_BODY_S = 5.0
PICTURES, READERS = 32, 8
"""Pictures that wait for S3 at once, and how many of them it is asked for; more are refused. With
an S3 that hangs they would take the threads and the slots of all other pages (serving/app.py)."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
api = FastAPI(
    title="DPDL",
    version="1",
    description=(
        "Alerts, cameras, scores and versions. Where serve.token is set, all send "
        "`Authorization: Bearer TOKEN`; without, only loopback is answered. Changes also want the "
        "header `x-dpdl: 1`."
    ),
    docs_url=None,  # FastAPI's pages load scripts from elsewhere
    redoc_url=None,
    openapi_url="/api/v1/openapi.json",
)


@api.middleware("http")
async def _guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    access: Access = request.app.state.access
    open_to_all = request.url.path in ("/login", "/login.js", "/console.css")
    client = request.client.host if request.client else None
    response: Response
    if not open_to_all and not access.allows(client, request.headers, request.cookies):
        response = _turned_away(request, access)
    elif not open_to_all and (refused := _refused(request)):
        response = refused
    else:
        response = await go_on(request)
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _turned_away(request: Request, access: Access) -> Response:
    """Who may not look: a person gets a page, a program a line."""
    url = request.url
    person = request.method == "GET" and "text/html" in request.headers.get("accept", "")
    if url.path != "/" and not person:
        return _problem(401, access.wanted)
    if access.session() is None:
        return HTMLResponse(pages.file("local.html"), status_code=401)
    if url.path == "/":
        return HTMLResponse(pages.login(), status_code=401)
    to = quote(url.path.lstrip("/") + (f"?{url.query}" if url.query else ""))
    return RedirectResponse(f"{request.scope.get('root_path', '')}/login?to={to}", status_code=303)


def _refused(request: Request) -> Response | None:
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return None
    if why := refused_change(request.headers):
        return _problem(403, why)
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or (length and not length.isdigit()):
        return _problem(411, "Content-Length is wanted")
    if int(length or 0) > MAX_BODY_BYTES:
        return _problem(413, f"at most {MAX_BODY_BYTES} bytes are wanted")
    return None


def _problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


@api.exception_handler(DpdlError)
async def _failed(request: Request, error: DpdlError) -> JSONResponse:
    if isinstance(error, NotFound):
        return _problem(404, str(error))
    if isinstance(error, PointerConflict | DataError):
        return _problem(409, str(error))
    log.warning("%s: %s", request.url.path, error)
    return _problem(503 if error.retryable else 500, type(error).__name__)


async def _asked(handle: DeploymentHandle[Any], method: str) -> dict[str, Any]:
    """What all replicas answer, in one; an empty one that says why where there is none."""
    try:
        answers = handle.broadcast(method)
        said = await answers.results_async(timeout_s=STATUS_S, return_exceptions=True)
    except Exception as error:  # restarting, overloaded, away: the page says so and asks again
        said = [error]
    return views.replicas(said)


async def _login_body(request: Request) -> str:
    body = b""
    try:
        async with asyncio.timeout(LOGIN_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413)
    except TimeoutError:
        raise HTTPException(408) from None
    return body.decode("utf-8", "replace")


def _found(stored: StoredResult | None, id: str) -> StoredResult:
    if stored is None:
        raise HTTPException(404, f"no such frame: {id}")
    return stored


@serve.ingress(api)
class Console:
    """The deployment's class.

    Args:
        consumer: for its state.
        scorer: for the version in use.
        model_name: scores the cameras that are bound to no other model.
    """

    def __init__(
        self, consumer: DeploymentHandle[Any], scorer: DeploymentHandle[Any], model_name: str
    ) -> None:
        log_to_stderr()
        settings = load_settings()
        token = settings.serve.token
        api.state.access = Access(token.get_secret_value() if token else None)
        self._settings = settings
        self._results = ResultStore(settings)
        self._evidence = EvidenceBucket(settings, hurried=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="pictures")
        self._pictures = asyncio.Semaphore(PICTURES)
        self._desk = Desk(settings, model_name)
        self._consumer, self._scorer = consumer, scorer
        replica = ReplicaMetrics("console", serve.get_replica_context().rank.rank)
        self._watch = Watch(settings, self._results, model_name, replica)
        self._logins = asyncio.Semaphore(LOGINS)

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page(self) -> HTMLResponse:
        return HTMLResponse(pages.file("index.html"))

    @api.get("/{name}.{kind}", include_in_schema=False)
    def static(self, name: str, kind: str) -> Response:
        asked = f"{name}.{kind}"
        if asked not in pages.STATIC:
            raise HTTPException(404)
        return Response(pages.file(asked), media_type=pages.STATIC[asked])

    @api.get("/login", include_in_schema=False)
    def login_page(self) -> HTMLResponse:
        access: Access = api.state.access
        return HTMLResponse(pages.login() if access.session() else pages.file("local.html"))

    @api.post("/login", include_in_schema=False)
    async def login(self, request: Request) -> Response:
        if self._logins.locked():
            raise HTTPException(429, "too many logins at once: try again in a few seconds")
        async with self._logins:
            access: Access = api.state.access
            given = parse_qs(await _login_body(request)).get("token", [""])[0]
            session = access.session()
            if session is None:
                return HTMLResponse(pages.file("local.html"), status_code=401)
            if not access.is_token(given):
                await asyncio.sleep(1)  # guessing costs time
                return HTMLResponse(pages.login("That is not the token."), status_code=401)
        to = request.query_params.get("to", "")
        to = to if to.startswith("api/v1/") else ""  # what one came for, and nothing elsewhere
        answer = RedirectResponse(f"{request.scope.get('root_path', '')}/{to}", status_code=303)
        # Lax: a link from Grafana brings the cookie with it. What changes something is no link, and
        # wants a header that no page from elsewhere can send.
        answer.set_cookie(
            COOKIE, session, httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )
        return answer

    # --- alerts and scores ---------------------------------------------------------------

    @api.get("/api/v1/alerts", responses=PROBLEMS)
    def alerts(
        self,
        count: Count = 50,
        before: StreamId = "",
        after: StreamId = "",
        camera: CameraFilter = "",
        from_ms: FromMs = None,
        to_ms: ToMs = None,
    ) -> schema.AlertPage:
        """Alerts, newest first.

        `before` pages back from `older`; `after` asks for what came since `newest`, and `skipped`
        says that more came than fit. `camera` keeps those of one camera, `from` and `to` those of
        a time.
        """
        if after and (before or from_ms is not None or to_ms is not None):
            raise HTTPException(422, "after stands alone: without before, from and to")
        if after:
            fresh = self._results.alerts(after, MAX_PAGE)
            return schema.AlertPage(
                alerts=self._frames([each for each in reversed(fresh) if lookup.of(each, camera)]),
                newest=fresh[-1].id if fresh else after,
                older=None,
                skipped=len(fresh) == MAX_PAGE,
            )
        found, older, first = lookup.alerts_back(
            self._results, count, before, camera, from_ms, to_ms
        )
        return schema.AlertPage(
            alerts=self._frames(found), newest=first or "0-0", older=older, skipped=False
        )

    @api.put("/api/v1/alerts/{id}/answer", responses=CHANGES)
    def answer_alert(self, id: EntryId, order: schema.AnswerOrder) -> schema.Answered:
        """Say what an alert was. The same again changes nothing; another one takes its place, with
        `expected` only of the one that you saw: 409 where somebody else's stands by now."""
        return self._answer(_found(self._results.alert(id), id), order)

    @api.delete("/api/v1/alerts/{id}/answer", responses=CHANGES)
    def undo_alert(self, id: EntryId, expected: Expected = None) -> schema.Answered:
        """Take the answer back, with all that it did; returns the answer that was."""
        result = _found(self._results.alert(id), id).result
        return views.answered(self._desk.undo(result, expected))

    @api.get("/api/v1/cameras", responses=PROBLEMS)
    def cameras(self) -> schema.CameraPage:
        """Cameras ever seen or configured, the worst first, at most MAX_CAMERAS."""
        known = self._results.cameras()
        return schema.CameraPage(cameras=views.cameras(known, MAX_CAMERAS), known=len(known))

    @api.get("/api/v1/cameras/{camera:path}/scores", responses=MISSING)
    def scores(
        self,
        camera: CameraId,
        count: Count = 100,
        before: StreamId = "",
        from_ms: FromMs = None,
        to_ms: ToMs = None,
    ) -> schema.ScorePage:
        """All scored frames of a camera, newest first; `before` pages back from `older`."""
        self._known(camera)
        page = self._results.scores(camera, count, before or None, from_ms=from_ms, to_ms=to_ms)
        older = page[-1].id if len(page) == count else None
        return schema.ScorePage(scores=self._frames(page), older=older)

    @api.get("/api/v1/cameras/{camera:path}/timeline", responses=MISSING)
    def timeline(
        self, camera: CameraId, hours: Annotated[float, Query(gt=0, le=24 * 31)] = 24.0
    ) -> schema.Timeline:
        """Scores of the last `hours`, in columns; as many as are kept, at most 20,000."""
        stream, own = self._settings.stream, self._known(camera).debounce
        rule = (own.k, own.n) if own else (stream.alert_k, stream.alert_n)
        rows, complete = lookup.last_hours(self._results, camera, hours)
        return views.timeline(rows, complete, *rule)

    @api.put("/api/v1/cameras/{camera:path}/scores/{id}/answer", responses=CHANGES)
    def answer_frame(
        self, camera: CameraId, id: EntryId, order: schema.AnswerOrder
    ) -> schema.Answered:
        """Say what any scored frame was, such as a defect that raised no alert."""
        return self._answer(_found(self._results.score(camera, id), id), order)

    @api.delete("/api/v1/cameras/{camera:path}/scores/{id}/answer", responses=CHANGES)
    def undo_frame(
        self, camera: CameraId, id: EntryId, expected: Expected = None
    ) -> schema.Answered:
        """Take the answer back, with all that it did; returns the answer that was."""
        result = _found(self._results.score(camera, id), id).result
        return views.answered(self._desk.undo(result, expected))

    @api.put("/api/v1/cameras/{camera:path}/threshold", responses=CHANGES)
    def set_threshold(self, camera: CameraId, order: schema.ThresholdOrder) -> schema.Camera:
        """A person's threshold for one camera, in place of the model's; null takes it back."""
        self._known(camera)
        self._results.set_threshold(camera, order.threshold, by=order.by)
        return views.camera(self._known(camera))

    @api.get("/api/v1/defects", responses=PROBLEMS)
    def defects(self) -> schema.Classes:
        """Classes of defects that people have named, the latest first."""
        return schema.Classes(classes=self._desk.classes())

    # --- pictures ------------------------------------------------------------------------

    @api.get(
        "/api/v1/evidence/{topic}/{partition}/{kept}/{name}",
        response_class=Response,
        responses=PICTURE,
    )
    async def evidence(
        self,
        topic: Topic,
        partition: Partition,
        kept: Kept,
        name: Annotated[str, Path(pattern=f"^({FRAME}|{HEAT})$")],
    ) -> Response:
        """The frame as it came, or its heat map as an overlay (RGBA PNG)."""
        if self._pictures.locked():
            raise HTTPException(503, f"{PICTURES} pictures wait for S3 already: try again")
        key, loop = f"{topic}/{partition}/{kept}/{name}", asyncio.get_running_loop()
        try:
            async with self._pictures:
                data = await loop.run_in_executor(self._readers, self._evidence.get, key)
        except ServiceUnavailable as error:
            log.warning("%s: %s", key, error)
            raise HTTPException(503, "S3 gives no picture: it is away, or slow") from None
        if data is None:
            raise HTTPException(404, "no such evidence: expired, or not yet in S3")
        return pages.picture(data)

    @api.get(
        "/api/v1/frames/{topic}/{partition}/{kept}", response_class=Response, responses=PICTURE
    )
    def frame(self, topic: Topic, partition: Partition, kept: Kept) -> Response:
        """Any frame as it came, while Kafka's retention lasts: by its frame id.

        With the time of capture, that frame alone: a topic made anew gives its ids to others.
        """
        if topic != self._settings.kafka.topic:
            raise HTTPException(404, "no such topic of frames")
        offset, _, time_ns = kept.partition("-")
        frame = frame_id(topic, int(partition), int(offset))
        image = self._desk.image(frame, int(time_ns) if time_ns else None)
        return pages.picture(image, lasting=bool(time_ns))

    # --- versions ------------------------------------------------------------------------

    @api.get("/api/v1/models", responses=PROBLEMS)
    def models(self) -> schema.ModelList:
        """Models in the store and those that cameras are bound to."""
        return self._desk.models(self._results.bindings())

    @api.get("/api/v1/versions", responses=PROBLEMS)
    def versions(
        self,
        model: ModelFilter = None,
        count: Count = 50,
        skip: Annotated[int, Query(ge=0, le=10**6)] = 0,
    ) -> schema.VersionPage:
        """Versions, newest first, with what the gate decided; and who promoted what when."""
        return self._desk.versions(model, count, skip)

    @api.post("/api/v1/versions/{version}/promote", responses=CHANGES)
    def promote(
        self, version: VersionId, order: schema.PromoteOrder, model: ModelFilter = None
    ) -> schema.Promotion:
        """Make a version current, whatever the gate said; it is verified first.

        To roll back, promote `rollback_to` with `back`. 409 where another version is current
        than `expected`.
        """
        moved = self._desk.promote(
            model,
            version,
            expected=order.expected,
            by=order.by,
            why=order.why,
            back=order.back,
        )
        return schema.Promotion(
            version=moved.version, at=moved.promoted_at, by=moved.by, why=moved.why
        )

    @api.get("/api/v1/status", responses=PROBLEMS)
    async def status(self) -> dict[str, Any]:
        """The version in use, refused versions, one consumer's totals, the trouble of all
        replicas, dead letters (null while Redis is away); waiting: by partition, frames in Kafka
        whose result is not yet published."""
        scorer, consumer, dead = await asyncio.gather(
            _asked(self._scorer, "info"),
            _asked(self._consumer, "stats"),
            self._dead_letters(),
        )
        waiting = self._watch.waiting
        return {"scorer": scorer, "consumer": consumer, "waiting": waiting, "dead_letters": dead}

    def check_health(self) -> None:
        """Healthy while it can be asked: Redis or S3 being away is no fault of this replica."""

    # -------------------------------------------------------------------------------------

    async def _dead_letters(self) -> dict[str, int] | None:
        """None while Redis is away: it is then that the others' trouble is asked for."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._results.dead_letters), STATUS_S)
        except (ServiceUnavailable, TimeoutError):
            return None

    def _known(self, camera: str) -> CameraState:
        state = self._results.camera(camera)
        if state is None:
            raise HTTPException(404, "no such camera")
        return state

    def _frames(self, found: list[StoredResult]) -> list[schema.Frame]:
        answers = self._desk.answers_of(each.result for each in found)
        return [views.frame(each, answers) for each in found]

    def _answer(self, stored: StoredResult, order: schema.AnswerOrder) -> schema.Answered:
        if (order.kind == "defect") != (order.defect is not None):
            raise HTTPException(422, "defect, its class, belongs to the kind defect")
        state = self._results.camera(stored.result.camera)
        given = self._desk.answer(
            stored.result,
            order.kind,
            defect=order.defect or "",
            by=order.by,
            expected=order.expected,
            bound=state.binding.model if state and state.binding else None,
        )
        return views.answered(given)
