"""S3 as a pyarrow filesystem that carries no secret when it is pickled.

Ray Train writes checkpoints from its controller and workers and pickles the filesystem to get it
there. A plain S3FileSystem would take the secret key along; this one takes the two paths of
Settings.worker_env(), and each process reads its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.fs as pafs

from infra.s3_client import make_filesystem
from infra.settings import Settings
from pipelines.sources import task_environment, task_settings


class _LateS3(pafs.FileSystemHandler):  # type: ignore[misc]
    """Forwards every call to the S3 filesystem of this process's settings, made on first use."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._inner: pafs.FileSystem | None = None

    @property
    def inner(self) -> pafs.FileSystem:
        if self._inner is None:
            self._inner = make_filesystem(task_settings(self._environment))
        return self._inner

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._environment,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LateS3) and other._environment == self._environment

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        return self.inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise PermissionError("emptying a whole S3 store is never wanted")

    def delete_file(self, path: str) -> None:
        self.inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.inner.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.inner.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self.inner.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self.inner.open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError("S3 objects cannot be appended to")


def shared_filesystem(settings: Settings) -> pafs.FileSystem:
    return pafs.PyFileSystem(_LateS3(task_environment(settings)))
