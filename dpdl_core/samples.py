"""What a data set is: samples with labels, not yet decoded. Used by layouts.py and protocol.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from dpdl_core.images import Box


class DatasetError(ValueError):
    """A folder that is no data set, or a split that the data set cannot give."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, or one box of an image, with its label."""

    label: int
    """0 normal, 1 anomaly."""
    defect: str
    """Class of the anomaly; "" for a normal image."""
    source: str
    """Name that is unique in the data set and the same on every machine: the path below its root,
    and "#left,top,right,bottom" behind it where the sample is a box."""
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    crop: Box | None = None
    """Box in pixels of the encoded image; pass it on to decode_image."""

    def read(self) -> bytes:
        """The encoded image. Raises OSError when the file cannot be read."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise ValueError(f"{self.source}: a sample needs a path or data")
        if self.path.suffix.lower() == ".npy":
            return _npy_to_png(self.path)
        return self.path.read_bytes()


@dataclass(frozen=True)
class Rejected:
    """A file that is no usable image: left out and reported, never passed over in silence."""

    source: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """All images of a data set, sorted by source."""

    name: str
    normals: list[Sample]
    """All normals; where test_normals is given, those of the data set's own training split."""
    test_normals: list[Sample] | None
    anomalies: list[Sample]
    left_out: list[Rejected] = field(default_factory=list)
    """Images of which the data set itself does not say what they show."""

    @property
    def defects(self) -> list[str]:
        return sorted({sample.defect for sample in self.anomalies})


_BEYOND = 64
"""Grey levels by which a value may miss 0..255 and is cut to it: room for Mastcam's calibrated
bands, and too little for 10 bits or more in a type that is wider."""


def _npy_to_png(path: Path) -> bytes:
    """First three bands of a (H, W, bands) array as PNG, so that it takes the one decode path.

    uint16 is 0..65535, all else 0..255. Mastcam: the first three bands are the colour image of the
    paper's section 7. Raises OSError for a file that is no such array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise OSError(f"{path.name}: not a plain array: {error}") from None
    if not isinstance(array, np.ndarray):  # an archive of several arrays, whatever its name
        raise OSError(f"{path.name}: {type(array).__name__}, wanted one array")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim != 3 or array.shape[2] < 3 or not array.size or array.dtype.kind not in "uif":
        raise OSError(
            f"{path.name}: {array.dtype} {array.shape}, wanted numbers (H, W, 3 or more bands)"
        )
    rgb = array[:, :, :3]
    if array.dtype not in (np.uint8, np.uint16):
        rgb = np.nan_to_num(rgb)
        low, high = rgb.min(initial=0), rgb.max(initial=0)
        if 0 < high <= 1 or low < -_BEYOND or high > 255 + _BEYOND:
            raise OSError(
                f"{path.name}: {array.dtype} from {low:.4g} to {high:.4g}, wanted 0 to 255: scale "
                "the values, or save them as uint8 or uint16"
            )
        rgb = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    return cv2.imencode(".png", np.ascontiguousarray(rgb[:, :, ::-1]))[1].tobytes()
