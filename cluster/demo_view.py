"""The demo's terminal: a live picture of the stream, or a line now and then where no one looks."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from infra.errors import DpdlError
from infra.redis_client import ResultStore, StoredResult
from infra.settings import Settings

REFRESH_S = 0.5
PLAIN_LINE_S = 5.0
ALERTS_SHOWN = 5


@dataclass
class StreamView:
    """Shows frames, rate, lag, cameras and alerts until the block ends; runs on its own thread.

    Reads Redis as any other watcher would. `sent` and `note` are set by whoever knows.
    """

    settings: Settings
    console: Console
    start: dict[int, int]
    total: int
    sent: int = 0
    note: str = ""
    """What else is going on, such as the refresh."""
    _last_alerts: list[StoredResult] = field(default_factory=list)
    _last_alert_id: str = "0"
    _num_alerts: int = 0
    _scored: int = 0
    _rate: float = 0.0
    _sampled: tuple[float, int] = (0.0, 0)

    def __enter__(self) -> StreamView:
        self._store = ResultStore(self.settings)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._store.close()

    def _run(self) -> None:
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=4, transient=False) as live:
                while not self._done.wait(REFRESH_S):
                    live.update(self._picture())
                live.update(self._picture())
            return
        while not self._done.wait(PLAIN_LINE_S):
            self._picture()
            self.console.print(self._summary())

    def _picture(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for name in ("camera", "frames", "anomalous", "last score", "threshold", "version"):
            table.add_column(name, justify="left" if name in ("camera", "version") else "right")
        try:
            self._read()
            for camera in sorted(self._store.cameras(), key=lambda state: state.camera):
                if camera.last_score is None or camera.threshold_used is None:
                    continue
                over = camera.last_score > camera.threshold_used
                table.add_row(
                    escape(camera.camera),
                    str(camera.frames),
                    str(camera.anomalies),
                    Text(f"{camera.last_score:.2f}", style="red" if over else ""),
                    f"{camera.threshold_used:.2f}",
                    camera.version or "",
                )
        except DpdlError as error:
            return Text(f"watching failed, the stream goes on: {error}", style="yellow")
        alerts = [
            Text.assemble(
                ("alert ", "red"),
                f"{stored.result.camera}  score {stored.result.score:.2f} > "
                f"{stored.result.threshold:.2f}  {stored.result.frame_id}",
            )
            for stored in self._last_alerts
        ]
        return Group(self._summary(), table, *alerts)

    def _read(self) -> None:
        progress = self._store.progress(self.settings.kafka.group, self.settings.kafka.topic)
        self._scored = sum(n - self.start.get(p, 0) for p, n in progress.items())
        now = time.monotonic()
        since, before = self._sampled
        if now - since >= 2.0:
            self._rate = (self._scored - before) / (now - since) if since else 0.0
            self._sampled = (now, self._scored)
        while new := self._store.alerts(self._last_alert_id, 500):
            self._last_alert_id = new[-1].id
            self._num_alerts += len(new)
            self._last_alerts = [*self._last_alerts, *new][-ALERTS_SHOWN:]

    def _summary(self) -> Text:
        return Text(
            f"{self._scored}/{self.total} frames scored, {self._rate:.0f} per second, "
            f"lag {max(0, self.sent - self._scored)}, {self._num_alerts} alerts"
            + (f" | {self.note}" if self.note else ""),
            style="bold",
        )
