"""What a renewal does to a model on real images: unchanged data, poison, drift. docs/renewal.md.

    python tests/benchmarks/renewal.py unchanged DATA
    python tests/benchmarks/renewal.py poison elpv --normals 480
    python tests/benchmarks/renewal.py drift elpv --normals 300

DATA: elpv or a folder of images. One JSON line for each model. `--normals N` takes N of the
training normals, `--test N` so many test images of each kind. As `dpdl refresh` does, a renewal
looks at 512 old normals at most; unlike there, images that are known are not left out first.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import cv2
import numpy as np
import torch

from dpdl_core import protocol
from dpdl_core.config import recipe
from dpdl_core.fit import RenewReport, fit, renew
from dpdl_core.images import ArraySource
from dpdl_core.metrics import auroc, conformal_threshold
from dpdl_core.model import Dpdl

CONFIG = recipe("edge")
Pixels = np.ndarray[Any, Any]
Shift = Callable[[Pixels], Pixels]


def brightness(change: float) -> Shift:
    return lambda x: (x.astype(np.float32) * (1 + change)).clip(0, 255).astype(np.uint8)


def contrast(change: float) -> Shift:
    return lambda x: ((x - 128.0) * (1 + change) + 128).clip(0, 255).astype(np.uint8)


def blur(sigma: float) -> Shift:
    """Gaussian, sigma in pixels of the model's square."""
    return lambda x: np.stack([cv2.GaussianBlur(image, (0, 0), sigma) for image in x])


SHIFTS: dict[str, Shift] = {
    "brightness -10 %": brightness(-0.1),
    "brightness -25 %": brightness(-0.25),
    "brightness -40 %": brightness(-0.4),
    "contrast -20 %": contrast(-0.2),
    "contrast -40 %": contrast(-0.4),
    "blur 0.7 px": blur(0.7),
    "blur 1.5 px": blur(1.5),
}


class Data:
    """The paper's split, ten seen defects: normals in three disjoint parts, and the test."""

    def __init__(self, given: argparse.Namespace, new: float, held_out: float) -> None:
        dataset = protocol.load_dataset(given.data)
        split = protocol.split(dataset, setting="general", shots=10, seed=given.seed)
        rng = random.Random(given.seed)
        chosen = list(split.train_normals)
        rng.shuffle(chosen)
        pixels = decode(chosen[: given.normals])
        late, held = round(new * len(pixels)), round(held_out * len(pixels))
        self.new, self.held_out = pixels[:late], pixels[late : late + held]
        self.old = pixels[late + held :]
        if given.mirrored:
            self.old = np.concatenate(
                [self.old[:, ::up, ::left] for up in (1, -1) for left in (1, -1)]
            )
        self.seen = decode(split.train_anomalies)
        tests = list(split.test)
        rng.shuffle(tests)
        self.defects = decode([s for s in tests if s.label][: given.test])
        self.test_normals = decode([s for s in tests if not s.label][: given.test])

    def auroc(self, model: Dpdl) -> float:
        return separation(scores(model, self.test_normals), scores(model, self.defects))


def separation(normal: Pixels, defect: Pixels) -> float:
    return auroc([0] * len(normal) + [1] * len(defect), np.concatenate([normal, defect]))


def decode(samples: Sequence[protocol.Sample]) -> Pixels:
    return protocol.decode_samples(samples, CONFIG.image_size)[0]


def scores(model: Dpdl, images: Pixels) -> Pixels:
    batches = torch.from_numpy(images).split(32)
    return np.concatenate([model.score(batch).score.double().numpy() for batch in batches])


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """CPU seconds, which other programs on the machine do not lengthen much."""
    started = time.process_time()
    return make(), time.process_time() - started


def fitted(data: Data, images: Pixels, seed: int) -> tuple[Dpdl, float]:
    return timed(lambda: fit(CONFIG, ArraySource(images), data.seen, seed=seed))


def renewed(
    model: Dpdl, data: Data, new: Pixels, seed: int, old: Pixels | None = None
) -> tuple[Dpdl, RenewReport, float]:
    exemplars = data.old if old is None else old
    # Evenly from all, as a refresh takes them.
    exemplars = exemplars[np.linspace(0, len(exemplars) - 1, min(512, len(exemplars))).astype(int)]
    (after, report), seconds = timed(
        lambda: renew(model, ArraySource(exemplars), ArraySource(new), data.seen, seed=seed)
    )
    return after, report, seconds


def say(**figures: Any) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


def unchanged(data: Data, seed: int) -> None:
    """Nothing new; the same normals again as if they were new; other normals of the same kind."""
    model, seconds = fitted(data, data.old, seed)
    before = data.auroc(model)
    say(what="fit", normals=len(data.old), auroc=before, cpu_s=seconds)
    fresh = data.new
    for what, new in (("none", fresh[:0]), ("the same again", data.old[:200]), ("fresh", fresh)):
        after, report, took = renewed(model, data, new, seed + 1)
        found = data.auroc(after)
        say(
            what=what,
            new=len(new),
            auroc=found,
            change=found - before,
            input_shift=report.input_shift,
            relearnt=report.relearnt,
            set_aside=len(report.set_aside),
            cpu_s=took,
        )


def poison(data: Data, seed: int) -> None:
    """Test defects among the new normals, 5 % and 20 % of these; those leave the test."""
    model, _ = fitted(data, data.old, seed)
    worst = round(0.2 / 0.8 * len(data.new))
    slipped, data.defects = data.defects[:worst], data.defects[worst:]
    say(what="before", normals=len(data.old), auroc=data.auroc(model))
    clean = None
    for share in (0.0, 0.05, 0.2):
        count = round(share / (1 - share) * len(data.new))
        new = np.concatenate([data.new, slipped[:count]])
        after, report, took = renewed(model, data, new, seed + 1)
        found = data.auroc(after)
        clean = found if clean is None else clean
        aside = set(report.set_aside)
        say(
            what=f"{share:.0%} defects",
            new=len(new),
            auroc=found,
            against_clean=found - clean,
            defects=count,
            defects_set_aside=len(aside & set(range(len(data.new), len(new)))),
            normals_set_aside=len(aside & set(range(len(data.new)))),
            relearnt=report.relearnt,
            cpu_s=took,
        )


def drift(data: Data, seed: int, rate: float, which: Sequence[str]) -> None:
    """The camera changes for good: all that is scored is shifted, and so are the new normals.

    No renewal, renewal, and training anew on old and new. The threshold is the camera's own, from
    its held-out normals: old ones without renewal, shifted ones after it. `refreshed` is by the
    threshold that a refresh sets soon after the change, from all old ones and one shifted for four
    that were learnt.
    """
    model, seconds = fitted(data, data.old, seed)
    limit = conformal_threshold(scores(model, data.held_out), rate)
    normal = scores(model, data.test_normals)
    say(
        what="no drift",
        normals=[len(data.old), len(data.new), len(data.held_out)],
        test=[len(data.test_normals), len(data.defects)],
        auroc=separation(normal, scores(model, data.defects)),
        false_alarms=float((normal > limit).mean()),
        cpu_s=seconds,
    )
    for name in which:
        shift = SHIFTS[name]
        new, held_out = shift(data.new), shift(data.held_out)
        normals, defects = shift(data.test_normals), shift(data.defects)
        after, report, took = renewed(model, data, new, seed + 1)
        full, full_took = fitted(data, np.concatenate([data.old, new]), seed + 1)
        models = {"none": (model, 0.0), "renewal": (after, took), "training": (full, full_took)}
        for what, (made, cpu) in models.items():
            shifted = scores(made, held_out)
            both = np.concatenate([scores(made, data.held_out), shifted[: len(new) // 4]])
            at = limit if what == "none" else conformal_threshold(shifted, rate)
            refreshed = limit if what == "none" else conformal_threshold(both, rate)
            normal = scores(made, normals)
            say(
                what=name,
                renewed_by=what,
                auroc=separation(normal, scores(made, defects)),
                false_alarms=float((normal > at).mean()),
                refreshed=float((normal > refreshed).mean()),
                cpu_s=cpu,
            )
        say(what=name, **{k: v for k, v in asdict(report).items() if k != "set_aside"})


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=["unchanged", "poison", "drift"])
    parser.add_argument("data", help="elpv, or a folder")
    parser.add_argument("--normals", type=int, help="so many of the training normals")
    parser.add_argument("--test", type=int, help="so many test normals and defects each")
    parser.add_argument(
        "--mirrored", action="store_true", help="old normals in four mirrorings: thousands of them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.05, help="stated false-alarm rate")
    parser.add_argument("--shifts", default=",".join(SHIFTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "unchanged":
        unchanged(Data(given, new=0.25, held_out=0.0), given.seed)
    elif given.what == "poison":
        poison(Data(given, new=0.25, held_out=0.0), given.seed)
    else:
        drift(Data(given, new=0.3, held_out=0.2), given.seed, given.rate, given.shifts.split(","))


if __name__ == "__main__":
    main()
