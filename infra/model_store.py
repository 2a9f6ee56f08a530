"""Model versions in S3: written once, verified when read, and a pointer that two cannot move.

    <name>/versions/<id>/<files>         weights.safetensors, config.json, ...
    <name>/versions/<id>/manifest.json   written last: until it is there the version does not exist
    <name>/current.json                  which version is current, with every move before it

The manifest lists each file's object, size and sha256. A version never changes: its manifest is
written only where there is none. The pointer is one object moved by conditional PUT, and its
history lies in it, so that no crash can part them. Knows bytes and JSON; what the files mean is
dpdl_core's. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from infra.errors import DataError, NotFound, PointerConflict, VersionBroken, VersionExists
from infra.s3_client import conditional_put, get, make_minio, s3_errors, sha256
from infra.settings import Settings
from infra.stored import from_fields

FORMAT = 1
MANIFEST = "manifest.json"
MOVES_KEPT = 200
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One move of the pointer."""

    version: str
    at: str
    """UTC, ISO 8601."""
    by: str
    why: str
    nonce: str
    """Tells a mover whose answer was lost that the move in place is its own."""
    back: bool | None = None
    """Whether it was a rollback; None in pointers of before moves said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """Which version is current. `etag` is what the next move must find."""

    version: str
    previous: str | None
    """The version that was current before, None at first."""
    promoted_at: str
    by: str
    why: str
    etag: str
    moves: tuple[Move, ...]
    """Oldest first, this one last; the last MOVES_KEPT."""


class _File(BaseModel):
    object: Annotated[str, Field(pattern=_NAME.pattern + "$")]
    """Its object beside the manifest: its own name, or one with its digest (see _put_file)."""
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    """Our part of a manifest; what else is in it belongs to who stored it."""

    format: int
    model: str
    version: str
    files: dict[str, _File]


def new_version_id(kind: str = "v") -> str:
    """Sorts by time (milliseconds, UTC) and is unique: v-20261125T093005123Z-9f86d0."""
    now = datetime.now(UTC)
    return f"{kind}-{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z-{secrets.token_hex(3)}"


class ModelStore:
    """The models bucket. Thread-safe.

    Every method can raise AuthFailed and ServiceUnavailable.
    """

    def __init__(self, settings: Settings) -> None:
        self._s3 = settings.s3
        self._bucket = settings.s3.models_bucket
        self._client = make_minio(settings)

    # --- versions ------------------------------------------------------------------------

    def put_version(
        self, name: str, version: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]
    ) -> None:
        """Write a version; it exists once this returns. `manifest` is kept beside our own keys.

        Doing it again with the same files is harmless, and what a killed writer left is built
        upon. Errors: VersionExists when a complete version has this id and other files.
        """
        _check_names(name, version, *files)
        if MANIFEST in files or not files:
            raise DataError(f"{name} {version}: files are wanted, and none called {MANIFEST}")
        with s3_errors(self._s3):
            described = {
                file: self._put_file(name, version, file, data) for file, data in files.items()
            }
            content = {
                **manifest,
                "format": FORMAT,
                "model": name,
                "version": version,
                "stored_at": _now(),
                "files": described,
            }
            data = _json(content)
            try:
                key = self._key(name, version, MANIFEST)
                conditional_put(self._client, self._bucket, key, data)
            except PointerConflict:
                there = self.manifest(name, version)["files"]
                if _digests(there) != _digests(described):
                    raise VersionExists(
                        f"{name} {version} is stored already with other files: versions never "
                        "change, use a new id"
                    ) from None

    def _put_file(self, name: str, version: str, file: str, data: bytes) -> dict[str, Any]:
        digest = sha256(data)
        entry = {"object": file, "bytes": len(data), "sha256": digest}
        try:
            conditional_put(self._client, self._bucket, self._key(name, version, file), data)
        except PointerConflict:
            # Left by a killed writer, or being written by another one now: never overwrite what
            # a manifest may come to name. Other content goes beside it, under its own digest.
            found, _ = get(self._client, self._bucket, self._key(name, version, file))
            if sha256(found) != digest:
                entry["object"] = f"{digest[:16]}-{file}"
                key = self._key(name, version, str(entry["object"]))
                self._client._put_object(self._bucket, key, data)
        return entry

    def manifest(self, name: str, version: str) -> dict[str, Any]:
        """What was given to put_version(), and format, model, version, stored_at, files.

        Errors: NotFound for a version that does not exist (or is half written), VersionBroken
        for a manifest that is unreadable, foreign or of a newer format.
        """
        _check_names(name, version)
        try:
            with s3_errors(self._s3):
                data, _ = get(self._client, self._bucket, self._key(name, version, MANIFEST))
        except NotFound:
            raise NotFound(
                f"model {name!r} has no version {version!r}: `dpdl models list` shows them"
            ) from None
        where = f"{name} {version}: {MANIFEST}"
        content = _read_json(data, where)
        _check_format(content, where)
        try:
            known = _Manifest.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise VersionBroken(f"{where}: {key}: {first['msg']}") from None
        if (known.model, known.version) != (name, version):
            raise VersionBroken(f"{where} is of {known.model} {known.version}: it was copied")
        return content

    def fetch(self, name: str, version: str) -> dict[str, bytes]:
        """A version's files, each verified by size and sha256.

        Errors: NotFound for a version that does not exist, VersionBroken for one that is not
        what was stored.
        """
        files: dict[str, bytes] = {}
        for file, entry in self.manifest(name, version)["files"].items():
            where = f"{name} {version}: {file}"
            try:
                with s3_errors(self._s3):
                    key = self._key(name, version, entry["object"])
                    data, _ = get(self._client, self._bucket, key)
            except NotFound:
                raise VersionBroken(f"{where} is missing: store the version again") from None
            if len(data) != entry["bytes"] or sha256(data) != entry["sha256"]:
                raise VersionBroken(
                    f"{where} has sha256 {sha256(data)[:12]} and {len(data)} bytes, the manifest "
                    f"says {entry['sha256'][:12]} and {entry['bytes']}: it was altered"
                )
            files[file] = data
        return files

    def list_models(self) -> list[str]:
        """Models of which anything is stored, in the order of their names."""
        with s3_errors(self._s3):
            found = [
                str(item.object_name).rstrip("/")
                for item in self._client.list_objects(self._bucket)
            ]
        return sorted(name for name in found if _NAME.fullmatch(name))

    def list_versions(self, name: str) -> list[str]:
        """Complete versions, in the order of their ids."""
        return list(self.written(name))

    def written(self, name: str) -> dict[str, datetime]:
        """list_versions(), and when each became complete by the clock of S3."""
        found = sorted(self._objects(name).items())
        return {v: objects[MANIFEST] for v, objects in found if MANIFEST in objects}

    def remove_version(self, name: str, version: str) -> bool:
        """Delete a version, unless it is current or rolling back goes through it; whether it went.

        It does not exist any more as soon as its manifest is gone, so nobody can begin to move the
        pointer to it then. Where somebody has moved it just before, the manifest comes back; who
        moves it just after finds none, and puts the pointer back.
        """
        objects = self._objects(name).get(version, {})
        if self._is_led_to(name, version):
            return False
        key = self._key(name, version, MANIFEST)
        with s3_errors(self._s3):
            if MANIFEST in objects:
                manifest, _ = get(self._client, self._bucket, key)
                self._client.remove_object(self._bucket, key)
                if self._is_led_to(name, version):
                    conditional_put(self._client, self._bucket, key, manifest)
                    return False
            for file in sorted(objects.keys() - {MANIFEST}):
                self._client.remove_object(self._bucket, self._key(name, version, file))
        return True

    def _is_led_to(self, name: str, version: str) -> bool:
        pointer = self.current(name)
        return pointer is not None and version in way_back(pointer.moves)

    def remove_half_written(self, name: str, *, older_than: timedelta) -> list[str]:
        """Delete what killed writers left; returns the versions that were never complete.

        Only versions whose newest object is older, so that one being written now is safe.
        """
        limit = datetime.now(UTC) - older_than
        removed = []
        for version, objects in sorted(self._objects(name).items()):
            if MANIFEST not in objects and max(objects.values()) < limit:
                with s3_errors(self._s3):
                    for file in objects:
                        self._client.remove_object(self._bucket, self._key(name, version, file))
                removed.append(version)
        return removed

    def _objects(self, name: str) -> dict[str, dict[str, datetime]]:
        """Version -> its objects -> when each was written."""
        _check_names(name)
        prefix = f"{name}/versions/"
        found: dict[str, dict[str, datetime]] = {}
        with s3_errors(self._s3):
            for item in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                version, _, file = str(item.object_name).removeprefix(prefix).partition("/")
                if file and item.last_modified is not None:
                    found.setdefault(version, {})[file] = item.last_modified
        return found

    # --- the pointer ---------------------------------------------------------------------

    def current(self, name: str) -> Pointer | None:
        """The pointer, or None where no version was ever promoted. VersionBroken: unreadable."""
        _check_names(name)
        try:
            with s3_errors(self._s3):
                data, etag = get(self._client, self._bucket, f"{name}/current.json")
        except NotFound:
            return None
        where = f"{name}/current.json"
        content = _read_json(data, where)
        _check_format(content, where)
        try:
            moves = tuple(from_fields(Move, move, "a move") for move in content["moves"])
            return _pointer(moves, etag)
        except (KeyError, TypeError, IndexError, DataError) as error:
            raise VersionBroken(f"{where} is not a pointer: {error!r}") from None

    def move_pointer(
        self,
        name: str,
        version: str,
        expected: Pointer | None,
        *,
        by: str,
        why: str,
        back: bool = False,
    ) -> Pointer:
        """Make `version` current, if the pointer is still the one that the caller saw.

        expected: what current() returned. back: to version_before(expected.moves), so that rolling
        back again goes further. Errors: PointerConflict when someone moved it meanwhile, NotFound
        or VersionBroken when the version does not exist or has no manifest.
        """
        self.manifest(name, version)
        nonce = secrets.token_hex(8)
        move = Move(version=version, at=_now(), by=by, why=why, nonce=nonce, back=back)
        moves = (*(expected.moves if expected else ()), move)[-MOVES_KEPT:]
        data = _pointer_file(moves)
        key = f"{name}/current.json"
        try:
            with s3_errors(self._s3):
                etag = conditional_put(
                    self._client,
                    self._bucket,
                    key,
                    data,
                    if_match=expected.etag if expected else None,
                )
        except PointerConflict:
            now = self.current(name)
            if now is not None and now.moves[-1].nonce == move.nonce:
                return now  # ours: a first try got through and only its answer was lost
            seen = expected.version if expected else "none"
            raise PointerConflict(
                f"{name}: the current version was {seen} when you looked and is "
                f"{now.version if now else 'none'} now: look again before you move it"
            ) from None
        try:
            self.manifest(name, version)
        except NotFound:
            # A prune has taken it since we looked, and looked at the pointer before we moved it.
            self._put_back(key, expected, etag)
            raise
        return _pointer(moves, etag)

    def _put_back(self, key: str, before: Pointer | None, etag: str) -> None:
        with s3_errors(self._s3):
            if before is None:
                self._client.remove_object(self._bucket, key)
            else:
                data = _pointer_file(before.moves)
                conditional_put(self._client, self._bucket, key, data, if_match=etag)

    @staticmethod
    def _key(name: str, version: str, file: str) -> str:
        return f"{name}/versions/{version}/{file}"


def _pointer_file(moves: Sequence[Move]) -> bytes:
    return _json({"format": FORMAT, "moves": [_fields(each) for each in moves]})


def way_back(moves: Sequence[Move]) -> list[str]:
    """The versions that rolling back goes through, the current one last.

    A rollback takes the last of them away, so that rolling back twice goes back twice; a promotion
    adds one, be it of an old version. A move that does not say which it was counts as a rollback
    where it went to one of them.
    """
    way: list[str] = []
    for move in moves:
        if move.back or (move.back is None and move.version in way):
            while way and way[-1] != move.version:
                way.pop()
        if way[-1:] != [move.version]:
            way.append(move.version)
    return way


def version_before(moves: Sequence[Move]) -> str | None:
    """What a rollback goes back to."""
    return next(iter(way_back(moves)[-2:-1]), None)


def _pointer(moves: tuple[Move, ...], etag: str) -> Pointer:
    last = moves[-1]
    return Pointer(
        version=last.version,
        previous=moves[-2].version if len(moves) > 1 else None,
        promoted_at=last.at,
        by=last.by,
        why=last.why,
        etag=etag,
        moves=moves,
    )


def _fields(move: Move) -> dict[str, Any]:
    return {name: getattr(move, name) for name in Move.__dataclass_fields__}


def _check_names(*names: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise DataError(f"name {name!a}: letters, digits, '.', '_', '-' wanted, 1 to 100")


def _check_format(content: Mapping[str, Any], where: str) -> None:
    found = content.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise VersionBroken(f"{where} has format {found}, known up to {FORMAT}: update dpdl")


def _digests(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {file: entry["sha256"] for file, entry in files.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


def _read_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise VersionBroken(f"{where} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise VersionBroken(f"{where} is no JSON object")
    return content
