"""What a training run is told and what it did, as files in S3: enough to go on, and to look back.

    <models>/<model>/runs/<run>/run.json     written before anything starts: options, config, data
    <models>/<model>/runs/<run>/checkpoint_* Ray Train's, the last one; what `--resume` goes on from
    <models>/<model>/versions/<run>/         the version, with run.json, epochs.jsonl, curves.png

A run and the version that it makes have one name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import DataError, NotFound, PointerConflict
from infra.s3_client import conditional_put, get, make_minio, s3_errors
from infra.settings import Settings

RUN, EPOCHS, CURVES = "run.json", "epochs.jsonl", "curves.png"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """run.json."""

    run: str
    model: str
    started_at: str
    options: dict[str, Any]
    """TrainOptions as given."""
    config: dict[str, Any]
    """The whole DpdlConfig."""
    data: dict[str, Any]
    """dataset_index.snapshot: every object with its ETag."""
    code: dict[str, str | None]
    """Package version and git commit."""

    def to_json(self) -> bytes:
        values = {"format": FORMAT, **asdict(self)}
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def save_run(settings: Settings, record: RunRecord) -> None:
    """Write run.json. DataError where the run has one already."""
    try:
        with s3_errors(settings.s3):
            conditional_put(
                make_minio(settings),
                settings.s3.models_bucket,
                _key(record.model, record.run),
                record.to_json(),
            )
    except PointerConflict:
        raise DataError(f"run {record.run!r} of {record.model!r} exists already") from None


def load_run(settings: Settings, model: str, run: str) -> RunRecord:
    """Raises DataError that lists the runs there are, or says why this one cannot be read."""
    try:
        with s3_errors(settings.s3):
            bucket = settings.s3.models_bucket
            data, _ = get(make_minio(settings), bucket, _key(model, run))
    except NotFound:
        known = ", ".join(list_runs(settings, model)) or "none"
        raise DataError(f"model {model!r} has no run {run!r}; there are: {known}") from None
    try:
        values = json.loads(data)
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return RunRecord(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"run {run!r} of {model!r} cannot be read ({error}): start anew") from None


def list_runs(settings: Settings, model: str) -> list[str]:
    """Names of a model's runs, oldest first."""
    prefix, end = f"{model}/runs/", f"/{RUN}"
    with s3_errors(settings.s3):
        # By their record: a store may keep folders that are empty.
        found = make_minio(settings).list_objects(
            settings.s3.models_bucket, prefix=prefix, recursive=True
        )
        keys = [str(item.object_name).removeprefix(prefix) for item in found]
    return sorted(key.removesuffix(end) for key in keys if key.count("/") == 1 and end in key)


def remove_run(settings: Settings, model: str, run: str) -> None:
    """Delete a run with its checkpoints, run.json last; its version is not touched."""
    client, bucket = make_minio(settings), settings.s3.models_bucket
    with s3_errors(settings.s3):
        found = client.list_objects(bucket, prefix=f"{model}/runs/{run}/", recursive=True)
        keys = [str(item.object_name) for item in found]
        for key in sorted(keys, key=lambda key: key == _key(model, run)):
            client.remove_object(bucket, key)


def _key(model: str, run: str) -> str:
    return f"{model}/runs/{run}/{RUN}"


# Pictures -----------------------------------------------------------------------------------


def epochs_to_lines(epochs: Sequence[dict[str, Any]]) -> bytes:
    """One JSON object per epoch and line."""
    return "".join(json.dumps(epoch, sort_keys=True) + "\n" for epoch in epochs).encode()


def epochs_from_lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


LOSSES = ("anomaly_head", "normal_head", "residual_head", "transport", "margin", "dispersion")


def draw(
    epochs: Sequence[dict[str, Any]],
    normals: Sequence[float],
    test: Sequence[tuple[float, int]],
    threshold: float,
) -> bytes:
    """A PNG: losses and energies by epoch, with the renewals, and the scores of held-out images.

    normals: scores of the calibration split; test: (score, label) of the test split.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15 if epochs else 6, 4), layout="constrained")
    panels = figure.subplots(1, 3 if epochs else 1, squeeze=False)[0]
    if epochs:
        numbers = [epoch["epoch"] for epoch in epochs]
        for name in LOSSES:
            panels[0].plot(numbers, [epoch[name] for epoch in epochs], label=name)
        panels[0].plot(numbers, [epoch["loss"] for epoch in epochs], "k", label="loss")
        panels[1].plot(numbers, [epoch["energy_of_normals"] for epoch in epochs], label="energy")
        panels[1].plot(
            numbers, [epoch["data_wait_share"] for epoch in epochs], label="share waiting for data"
        )
        for panel in panels[:2]:
            for epoch in epochs:
                if "renewal" in epoch:
                    panel.axvline(epoch["epoch"], color="grey", linestyle=":", linewidth=1)
            panel.set_xlabel("epoch (dotted: prototypes renewed)")
            panel.legend(fontsize="small")
        panels[0].set_title("losses, eqs. 16-23")
        panels[1].set_title("normals' energy, data")
    last = panels[-1]
    groups = [
        ("held-out normals", list(normals)),
        ("test normals", [score for score, label in test if not label]),
        ("test anomalies", [score for score, label in test if label]),
    ]
    for name, scores in (group for group in groups if group[1]):
        last.hist(scores, bins=30, density=True, histtype="step", linewidth=1.5, label=name)
    last.axvline(threshold, color="k", label="alert threshold")
    last.set_title("scores")
    last.legend(fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, metadata={"Software": None})
    return out.getvalue()
