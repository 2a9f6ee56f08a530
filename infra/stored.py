"""Small stored records as dataclasses, also those that a newer version of this product wrote."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TypeVar

from infra.errors import DataError

T = TypeVar("T")


def from_json(cls: type[T], data: str | bytes, where: str) -> T:
    """DataError, naming `where`, for what is no such record."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from None
    return from_fields(cls, content, where)


def from_fields(cls: type[T], content: object, where: str) -> T:
    """Fields that we do not know are left out: after a rollback the newer version's are there.

    DataError, naming `where`, for what is no such record.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where} is no JSON object")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    try:
        return cls(**{name: value for name, value in content.items() if name in known})
    except TypeError as error:
        raise DataError(f"{where} is unreadable: {error}") from None
