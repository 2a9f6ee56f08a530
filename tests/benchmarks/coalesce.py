"""Is one call of many frames faster than many calls? Frames a second by frames in a call, in turns.

    python tests/benchmarks/coalesce.py [cpu|cuda]

The recipe "edge" with its pretrained trunk, one thread on a CPU. If the rate does not grow beyond
stream.max_batch, putting consumers' calls together (serving/coalesce.py) gains nothing.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from dpdl_core.config import recipe
from pipelines.bench_score import _any_model

SIZES = (1, 4, 8, 16, 32, 64)
ROUNDS = 3


def main(device: str) -> None:
    torch.set_num_threads(1)
    model = _any_model(recipe("edge"), device)
    size = model.config.image_size
    frames = torch.randint(256, (max(SIZES), size, size, 3), dtype=torch.uint8, device=device)
    seconds: dict[int, list[float]] = {count: [] for count in SIZES}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for count in SIZES:
                started = time.perf_counter()
                model.score(frames[:count]).score.cpu()  # .cpu() waits for a GPU
                if turn:
                    seconds[count].append(time.perf_counter() - started)
    print("frames in a call  frames/s  ms a call")
    for count, took in seconds.items():
        median = statistics.median(took)
        print(f"{count:16d} {count / median:9.1f} {1000 * median:10.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cpu"])
