"""The application as `dpdl serve` deploys it, with two consumers; it ends with its stdin.

    python tests/faults/deploy.py MODEL

A process of its own, so that a fault can take all of Ray with it, driver included.
"""

import os
import sys

import ray

from infra.settings import load_settings
from serving import app

if __name__ == "__main__":
    settings = load_settings({**os.environ, "DPDL_SERVE_MIN_CONSUMERS": "2"})
    app.deploy(settings, model_name=sys.argv[1], device="cpu", deadline_s=300)
    print("running", flush=True)
    sys.stdin.read()
    app.shutdown()
    ray.shutdown()
