"""The stream: serve it, feed it, watch its alerts."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.shared import Model, err, out

app = typer.Typer()

TARGETS_S = 15.0
"""How often `dpdl serve` says anew where Prometheus finds the cluster's metrics."""


@app.command()
def serve(model: Model = "default") -> None:
    """Deploy the stream application (consumer, scorer, console) and keep it until Ctrl-C."""
    import ray
    from ray.exceptions import RayError

    from infra import ray_runtime
    from infra.settings import load_settings
    from serving import app as stream_app

    settings = load_settings()
    targets = ray_runtime.scrape_targets_file(settings.state_dir)
    try:
        deployed = stream_app.deploy(settings, model_name=model, say=out.print)
        out.print(f"{deployed.version} scores; alerts at {deployed.url}   (Ctrl-C ends)")
        while True:  # nodes come and go
            try:
                ray_runtime.write_scrape_targets(targets)
            except (OSError, RayError) as error:  # a full disk; a head that is restarted
                err.print(f"Prometheus cannot find this cluster: {error}", markup=False)
            time.sleep(TARGETS_S)
    finally:
        if ray.is_initialized():
            stream_app.shutdown()
            ray.shutdown()


@app.command()
def stream(
    src: Annotated[Path, typer.Argument(help="Folder of images.", exists=True, file_okay=False)],
    camera: Annotated[str, typer.Option(help="Camera id.")],
    fps: Annotated[float, typer.Option(min=0.01, help="Frames per second.")] = 5.0,
) -> None:
    """Send the images of a folder as a camera's frames."""
    from cluster.camera import SentFrame, folder_frames
    from cluster.camera import stream as send
    from infra.kafka_client import ensure_topics
    from infra.settings import load_settings

    settings = load_settings()
    ensure_topics(settings)
    sent: list[SentFrame] = []
    try:
        send(
            settings,
            folder_frames(src, camera),
            frames_per_second=fps,
            stop=threading.Event(),
            on_sent=sent.append,
        )
    finally:
        out.print(f"{len(sent)} frames sent as {camera}", markup=False)


@app.command()
def alerts(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    count: Annotated[int, typer.Option(min=1, max=500, help="How many of the past.")] = 20,
) -> None:
    """Print alerts, oldest first, one JSON object a line."""
    from infra.redis_client import ResultStore
    from infra.settings import load_settings

    store = ResultStore(load_settings())
    shown = store.latest_alerts(count)[::-1]
    last = shown[-1].id if shown else "0"
    while True:
        for stored in shown:
            print(json.dumps({"id": stored.id, **asdict(stored.result)}), flush=True)
            last = stored.id
        if not follow:
            return
        shown = store.alerts(last, block_s=3.0)
