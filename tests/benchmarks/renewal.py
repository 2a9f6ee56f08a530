"""What a renewal does to a model on real images: unchanged data, poison, drift. docs/renewal.md.

    python tests/benchmarks/renewal.py unchanged DATA
    python tests/benchmarks/renewal.py poison elpv --normals 400
    python tests/benchmarks/renewal.py drift elpv --normals 300

DATA: elpv or a folder of images. One JSON line per model and a table at the end. `--normals N`
takes N of the training normals. Renewal looks at 512 old normals, as `dpdl refresh` does.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
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
    """The paper's split, ten seen defects: normals in four disjoint parts, and the test."""

    def __init__(self, spec: str, normals: int | None, seed: int, new: float = 0.0) -> None:
        split = protocol.split(protocol.load_dataset(spec), setting="general", shots=10, seed=seed)
        chosen = list(split.train_normals)
        random.Random(seed).shuffle(chosen)
        pixels = decode(chosen[:normals])
        late = round(new * len(pixels))
        held = len(pixels) // 5 if late else 0
        self.new, self.held_out = pixels[:late], pixels[late : late + held]
        self.old = pixels[late + held :]
        self.seen = decode(split.train_anomalies)
        self.defects = decode([s for s in split.test if s.label])
        self.test_normals = decode([s for s in split.test if not s.label])

    def auroc(self, model: Dpdl, shift: Shift = lambda x: x) -> float:
        normal, defect = scores(model, shift(self.test_normals)), scores(model, shift(self.defects))
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
    exemplars = (data.old if old is None else old)[:512]
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
    say(what="before", normals=len(data.old), auroc=data.auroc(model))
    worst = round(0.2 / 0.8 * len(data.new))
    slipped, data.defects = data.defects[:worst], data.defects[worst:]
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

    No renewal, renewal, and training anew on old and new; thresholds from held-out normals, old
    ones for the present model, old and shifted ones each as a camera of its own afterwards.
    """
    model, seconds = fitted(data, data.old, seed)
    limit = conformal_threshold(scores(model, data.held_out), rate)
    alarms = float((scores(model, data.test_normals) > limit).mean())
    say(what="no drift", auroc=data.auroc(model), false_alarms=alarms, cpu_s=seconds)
    for name in which:
        shift = SHIFTS[name]
        new, held_out = shift(data.new), shift(data.held_out)
        after, report, took = renewed(model, data, new, seed + 1)
        full, full_took = fitted(data, np.concatenate([data.old, new]), seed + 1)
        for what, m, t, cpu in (
            ("none", model, limit, 0.0),
            ("renewal", after, conformal_threshold(scores(after, held_out), rate), took),
            ("training", full, conformal_threshold(scores(full, held_out), rate), full_took),
        ):
            found = float((scores(m, shift(data.test_normals)) > t).mean())
            say(
                what=name,
                renewed_by=what,
                auroc=data.auroc(m, shift),
                auroc_undrifted=data.auroc(m),
                false_alarms=found,
                cpu_s=cpu,
                **(
                    {
                        "input_shift": report.input_shift,
                        "relearnt": report.relearnt,
                        "set_aside": len(report.set_aside),
                        "replaced": report.replaced,
                        "prototypes": report.prototypes,
                    }
                    if what == "renewal"
                    else {}
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["unchanged", "poison", "drift"])
    parser.add_argument("data")
    parser.add_argument("--normals", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.05, help="stated false-alarm rate")
    parser.add_argument("--shifts", default=",".join(SHIFTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    new = {"unchanged": 0.25, "poison": 0.3, "drift": 0.3}[given.what]
    data = Data(given.data, given.normals, given.seed, new)
    if given.what == "unchanged":
        unchanged(data, given.seed)
    elif given.what == "poison":
        poison(data, given.seed)
    else:
        drift(data, given.seed, given.rate, given.shifts.split(","))


if __name__ == "__main__":
    main()
