"""One tree of errors; each class says whether trying again can help.

    DpdlError
      SettingsError            a setting is missing, unknown or wrong: a person must change it
      AuthFailed               a service knows us not, or not for this: a person must change it
      ServiceUnavailable       (retryable) no answer in time, or not ready
        StoreFull              (retryable) Redis is out of memory; it works again once there is room
      DataError                what came in is not what the contract says
        NotFound               an object, topic or version that should be there is not
        BadFrame               one Kafka record; .reason is the slug of the dead-letter topic
        DataMoved              (retryable) what was being read was taken away meanwhile
        VersionExists          a version of this id is complete already; versions never change
        VersionBroken          a stored model version is incomplete, altered or unreadable
      PointerConflict          (retryable, after a fresh look) someone moved the pointer first
      Fenced                   another consumer has published past this batch: re-read the offset

Every message is one line: what was found, what was wanted, what to do. Errors travel between
processes (Ray pickles them), so `args` always equals the constructor's arguments.
"""

from __future__ import annotations


class DpdlError(Exception):
    """Root of everything this product raises on purpose."""

    retryable = False
    """True where the same call can succeed later with nothing changed by a person."""


class SettingsError(DpdlError):
    """A setting is missing, unknown or wrong; names the key and the source."""


class AuthFailed(DpdlError):
    """Credentials were refused, or are not allowed to do this."""


class ServiceUnavailable(DpdlError):
    """A service did not answer within its deadline, or says that it is not ready."""

    retryable = True


class StoreFull(ServiceUnavailable):
    """Redis refuses writes because it is at its memory limit."""


class DataError(DpdlError):
    """Data that breaks its contract; trying again gives the same."""


class NotFound(DataError):
    """What the caller asked for does not exist."""


class DataMoved(DataError):
    """An object of a data set was there when its work began, and is not any more."""

    retryable = True


class BadFrame(DataError):
    """A Kafka record that is no frame. `reason` is a short slug, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class VersionExists(DataError):
    """A complete version already has this id, with other files."""


class VersionBroken(DataError):
    """A model version that must not be loaded."""


class PointerConflict(DpdlError):
    """The pointer to the current model version is not the one the caller saw."""

    retryable = True


class Fenced(DpdlError):
    """A batch was refused: the stored next offset is `expected`, the batch began at `found`.

    Nothing of the batch was written. Seek to the stored offset and go on from there.
    """

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return (
            f"batch begins at offset {self.found}, but results are stored up to {self.expected}: "
            f"another consumer published first; seek to {self.expected}"
        )
