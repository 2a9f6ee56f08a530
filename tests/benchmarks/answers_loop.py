"""What people's answers are worth, on ELPV: a refresh after 20 false alarms, and after 20 defects.

    python tests/benchmarks/answers_loop.py false-alarms --report false_alarms.json
    python tests/benchmarks/answers_loop.py defects --report defects.json

false-alarms  a model that learnt monocrystalline cells meets polycrystalline ones: 20 of the normal
              images that alarm are answered "false alarm"; rate on the other normals, before, after
defects       the hard setting: ten monocrystalline defects are known, 20 polycrystalline ones are
              answered "defect"; AUROC of the other polycrystalline ones, before and after

The answered images go where pipelines/candidate.py puts them: the false alarms are learnt past the
sieve, all of them, and none joins the thresholds' normals; the defects join the known ones.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

from dpdl_core import protocol
from dpdl_core.config import recipe
from dpdl_core.fit import fit, renew
from dpdl_core.images import ArraySource
from dpdl_core.layouts import read_elpv_package
from dpdl_core.metrics import auroc
from pipelines.candidate import EXEMPLARS
from pipelines.scoring import calibrate

FED = 20
SHOTS = 10
FALSE_ALARM_RATE = 0.01
CALIBRATION_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=("false-alarms", "defects"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    chosen = parser.parse_args()
    began = time.perf_counter()
    run = false_alarms if chosen.part == "false-alarms" else defects
    report = {"part": chosen.part, "seed": chosen.seed, **run(chosen.seed)}
    report["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(report, indent=1))
    if chosen.report:
        chosen.report.write_text(json.dumps(report, indent=1) + "\n")


def false_alarms(seed: int) -> dict[str, object]:
    """Rate of alarms on polycrystalline normals that nobody answered, before and after."""
    data = read_elpv_package()
    kinds = _kinds()
    rng = random.Random(seed)
    by_kind = {"mono": [], "poly": []}
    for sample in rng.sample(data.normals, len(data.normals)):
        by_kind[kinds[sample.source.rsplit("/", 1)[-1]]].append(sample)
    known = [s for s in data.anomalies if s.defect == "mono"]
    seen = rng.sample(known, SHOTS)
    held = round(CALIBRATION_SHARE * len(by_kind["mono"]))
    calibration, normals = by_kind["mono"][:held], by_kind["mono"][held:]
    model = fit(recipe("edge"), ArraySource(_decoded(normals)), _decoded(seen), seed=seed)
    threshold, scores = _threshold(model, calibration)
    met, fresh = (
        by_kind["poly"][: len(by_kind["poly"]) // 2],
        by_kind["poly"][len(by_kind["poly"]) // 2 :],
    )
    alarmed = [s for s, score in zip(met, _scores(model, met), strict=True) if score > threshold]
    answered = alarmed[:FED]
    after, renewal = renew(
        model,
        ArraySource(_decoded(_exemplars(normals))),
        ArraySource(_decoded(answered)),
        _decoded(seen),
        seed=seed,
        vouched=[True] * len(answered),
    )
    threshold_after, _ = _threshold(after, calibration)
    poly = [s for s in data.anomalies if s.defect == "poly"]
    mono = [s for s in known if s not in seen]
    return {
        "normals_learnt": len(normals),
        "false_alarms_found": len(alarmed),
        "answered": len(answered),
        "relearnt": renewal.relearnt,
        "fresh_normals": len(fresh),
        "false_alarm_rate_before": _share(model, fresh, threshold),
        "false_alarm_rate_after": _share(after, fresh, threshold_after),
        "alarms_on_mono_normals_before": float((scores > threshold).mean()),
        "alarms_on_mono_normals_after": _share(after, calibration, threshold_after),
        "poly_defects_found_before": _share(model, poly, threshold),
        "poly_defects_found_after": _share(after, poly, threshold_after),
        "mono_defects_found_before": _share(model, mono, threshold),
        "mono_defects_found_after": _share(after, mono, threshold_after),
    }


def defects(seed: int) -> dict[str, object]:
    """AUROC of polycrystalline defects that nobody answered, before and after."""
    split = protocol.split(
        read_elpv_package(), setting="hard", shots=SHOTS, seed=seed, seen_class="mono"
    )
    unseen = [s for s in split.test if s.label == 1]
    answered = random.Random(seed).sample(unseen, FED)
    rest = [s for s in unseen if s not in answered]
    fresh = [s for s in split.test if s.label == 0]
    normals, seen = _decoded(split.train_normals), _decoded(split.train_anomalies)
    model = fit(recipe("edge"), ArraySource(normals), seen, seed=seed)
    after, _ = renew(
        model,
        ArraySource(_decoded(_exemplars(split.train_normals))),
        ArraySource(_decoded([])),
        np.concatenate([seen, _decoded(answered)]),
        seed=seed,
        relearn=True,
    )
    labels = [0] * len(fresh) + [1] * len(rest)
    return {
        "known_defects": len(seen),
        "answered": len(answered),
        "test_normals": len(fresh),
        "test_defects": len(rest),
        "auroc_before": auroc(labels, _scores(model, [*fresh, *rest])),
        "auroc_after": auroc(labels, _scores(after, [*fresh, *rest])),
    }


def _kinds() -> dict[str, str]:
    """File name -> mono or poly, of normals too: the layout names the kind of anomalies alone."""
    import elpv_dataset

    labels = Path(elpv_dataset.__file__).parent / "data" / "labels.csv"
    rows = [line.split() for line in labels.read_text().splitlines() if line.split()]
    return {row[0].rsplit("/", 1)[-1]: row[2] for row in rows}


def _decoded(samples: list[protocol.Sample]) -> np.ndarray:
    size = recipe("edge").image_size
    if not samples:
        return np.empty((0, size, size, 3), np.uint8)
    return protocol.decode_samples(samples, size)[0]


def _exemplars(normals: list[protocol.Sample]) -> list[protocol.Sample]:
    """As many old normals as a refresh looks at again, evenly from all."""
    count = min(EXEMPLARS, len(normals))
    return [normals[i * len(normals) // count] for i in range(count)]


def _scores(model, samples: list[protocol.Sample]) -> np.ndarray:
    batches = ArraySource(_decoded(samples)).batches(32)
    return torch.cat([model.score(batch).score for batch in batches]).double().numpy()


def _threshold(model, samples: list[protocol.Sample]) -> tuple[float, np.ndarray]:
    scores = _scores(model, samples)
    thresholds, _ = calibrate(scores, [""] * len(samples), FALSE_ALARM_RATE)
    return float(thresholds["default"]), scores


def _share(model, samples: list[protocol.Sample], threshold: float) -> float:
    return float((_scores(model, samples) > threshold).mean())


if __name__ == "__main__":
    main()
