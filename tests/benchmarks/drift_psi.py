"""What drift's PSI says on real images: `python tests/benchmarks/drift_psi.py --report FILE`.

ELPV by the edge recipe: a model on some normals, its reference on others, and then 500 frames of
normals that neither has seen: as they are, moved, and one in five a defect.
Each PSI is also told as a share of the version's bound. Without drift no share may be above 1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from dpdl_core import config, fit, images, protocol
from dpdl_core.drift import WINDOW, Drift, reference

FIT, HELD_OUT, OTHERS = 240, 200, 400
GAINS = {"15 % darker": 0.85, "25 % darker": 0.75, "15 % brighter": 1.15}
BLURS = {"blurred 0.7 px": 0.7, "blurred 1.5 px": 1.5}
DEFECTS = "one in five a defect"


def moved(frames, how):
    """uint8 (N,S,S,3) frames as a camera would send them after something has happened to it."""
    if how in GAINS:
        return (frames.astype(np.float32) * GAINS[how]).clip(0, 255).astype(np.uint8)
    if how == "40 % less contrast":
        return ((frames - 128.0) * 0.6 + 128).clip(0, 255).astype(np.uint8)
    if how in BLURS:
        return np.stack([cv2.GaussianBlur(frame, (0, 0), BLURS[how]) for frame in frames])
    return frames


def observed(model, frames):
    scores = [model.score(torch.from_numpy(frames[i : i + 32])) for i in range(0, len(frames), 32)]
    return (
        torch.cat([s.energy for s in scores]).numpy(),
        torch.cat([s.winners for s in scores]).numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    recipe = config.recipe("edge")
    data = protocol.load_dataset("elpv")
    split = protocol.split(data, setting="general", shots=10, seed=0)
    unseen = [sample for sample in split.test if not sample.label]
    normals = [*split.train_normals, *unseen]
    order = np.random.default_rng(0).permutation(len(normals))[: FIT + HELD_OUT + WINDOW + OTHERS]
    pixels = protocol.decode_samples([normals[i] for i in order], recipe.image_size)[0]
    seen = protocol.decode_samples(split.train_anomalies, recipe.image_size)[0]
    defects = [sample for sample in split.test if sample.label][: WINDOW // 5]
    wrong = protocol.decode_samples(defects, recipe.image_size)[0]
    model = fit.fit(recipe, images.ArraySource(pixels[:FIT]), seen, seed=0)
    held_out = observed(model, pixels[FIT : FIT + HELD_OUT])
    first = next(iter(model.parts.energies.patches))
    count = model.parts.energies.sizes[f"patch {first}"]
    kept = reference(*held_out, [""] * HELD_OUT, count)
    frames, others = np.split(pixels[FIT + HELD_OUT :], [WINDOW])
    found = {}
    for how in ("as they are", "other normals", *GAINS, "40 % less contrast", *BLURS, DEFECTS):
        sent = moved(frames, how)
        if how == "other normals":
            sent = others
        if how == DEFECTS:
            sent = np.concatenate([frames[: WINDOW - len(wrong)], wrong])
        watched = Drift(kept)
        watched.add(["a"] * len(sent), *observed(model, sent))
        found[how] = {
            of: {"psi": round(each.value, 3), "share": round(each.value / each.bound, 2)}
            for of, each in watched.psi()["a"].items()
        }
        print(f"{how:<22} {found[how]}", flush=True)
    report = {"psi": found, "held_out": HELD_OUT, "frames": WINDOW}
    report["seconds"] = round(time.perf_counter() - began, 1)
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
