"""Parameters of the HTTP API, and which problems its operations answer with. Knows no request."""

from typing import Annotated, Any

from fastapi import Path, Query

from serving.console import schema

MAX_PAGE = 500

# Redis takes 64 bits for each part.
StreamId = Annotated[str, Query(pattern=r"^(\d{1,19}-\d{1,19})?$", description="A stream id.")]
EntryId = Annotated[str, Path(pattern=r"^\d{1,19}-\d{1,19}$", description="A stream id.")]
Count = Annotated[int, Query(ge=1, le=MAX_PAGE)]
CameraFilter = Annotated[str, Query(max_length=128)]
CameraId = Annotated[str, Path(min_length=1, max_length=128)]
VersionId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
ModelFilter = Annotated[
    str | None,
    Query(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="By default the default one."),
]
Topic = Annotated[str, Path(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
Partition = Annotated[str, Path(pattern=r"^\d{1,9}$")]
Kept = Annotated[
    str, Path(pattern=r"^\d{1,20}(-\d{1,19})?$", description="Offset, and time of capture in ns.")
]
FromMs = Annotated[
    int | None,
    Query(alias="from", ge=0, lt=2**53, description="Scored at this time or later, unix ms."),
]
Expected = Annotated[
    float | None,
    Query(ge=0, description="`at_ms` of the answer that you saw, else any is meant."),
]
ToMs = Annotated[int | None, Query(alias="to", ge=0, lt=2**53, description="Not later than this.")]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": schema.Problem, "description": "A token is needed."},
    503: {"model": schema.Problem, "description": "A service is away; try again."},
}
MISSING: dict[int | str, dict[str, Any]] = PROBLEMS | {
    404: {"model": schema.Problem, "description": "There is none (any more)."}
}
CHANGES: dict[int | str, dict[str, Any]] = MISSING | {
    403: {"model": schema.Problem, "description": "The header x-dpdl is missing, or the origin."},
    409: {"model": schema.Problem, "description": "It does not fit what there is now."},
    411: {"model": schema.Problem, "description": "Content-Length is missing."},
    413: {"model": schema.Problem, "description": "The body is too large."},
}
PICTURE: dict[int | str, dict[str, Any]] = MISSING | {
    200: {
        "description": "The bytes.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in (
                "image/jpeg", "image/png", "image/gif", "image/bmp", "image/webp",
                "application/octet-stream",
            )
        },
    }
}  # fmt: skip
