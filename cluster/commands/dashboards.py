"""Grafana's dashboards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.shared import err, out

app = typer.Typer(
    help="Grafana dashboards over Prometheus and the alert API.", no_args_is_help=True
)


@app.callback()
def group() -> None:
    """A group even with one command in it."""


@app.command()
def push(
    url: Annotated[
        str, typer.Option(help="Of Grafana, http(s)://HOST[:PORT]; default: grafana.url.")
    ] = "",
    token: Annotated[
        str,
        typer.Option(
            help="Of a service account. Others on this machine can read it here: better set "
            "DPDL_GRAFANA_TOKEN_FILE or --token-file."
        ),
    ] = "",
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the token.", exists=True, dir_okay=False)
    ] = None,
    prometheus: Annotated[
        str, typer.Option(help="Prometheus, as Grafana reaches it.")
    ] = "http://127.0.0.1:9090",
    api: Annotated[
        str, typer.Option(help="The alert API, as Grafana reaches it; default: serve.http_host.")
    ] = "",
    console: Annotated[
        str, typer.Option(help="The console, as a browser reaches it; default: as --api.")
    ] = "",
) -> None:
    """Create or update folder, data sources and dashboards; a second time changes nothing."""
    from infra.errors import SettingsError
    from infra.grafana_client import Grafana
    from infra.settings import load_settings

    settings = load_settings()
    url = url or settings.grafana.url
    if not url:
        raise SettingsError("no Grafana is known: give --url, or set DPDL_GRAFANA_URL")
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    elif not token and settings.grafana.token is not None:
        token = settings.grafana.token.get_secret_value()
    serve = settings.serve
    if not api and serve.http_host in ("0.0.0.0", "::"):
        raise SettingsError(
            f"serve.http_host={serve.http_host} is no address that Grafana can ask: give --api "
            "http://HOST:PORT as Grafana reaches it"
        )
    api = api or f"http://{serve.http_host}:{serve.http_port}"
    pushed = Grafana(url, token).push(
        prometheus_url=prometheus,
        alert_api_url=api,
        console_url=console or api,
        alert_api_token=serve.token.get_secret_value() if serve.token else None,
    )
    for what in ("created", "updated", "unchanged"):
        for name in getattr(pushed, what):
            out.print(f"{what:<9} {name}", markup=False)
    if not settings.grafana.url:
        err.print(
            "set DPDL_GRAFANA_URL and DPDL_GRAFANA_TOKEN_FILE, and promotions, rollbacks and held "
            "refreshes are annotated there",
            style="dim",
        )
