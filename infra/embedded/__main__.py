"""`python -m infra.embedded`: fetch and prepare all that the services need, before a first start.

`make` calls it during set-up, so that later starts need no network and are fast.
"""

import sys

from infra.embedded import aot
from infra.errors import DpdlError
from infra.settings import load_settings

if __name__ == "__main__":
    try:
        aot.record(load_settings().embedded.cache_dir, print)
    except (DpdlError, OSError) as error:
        sys.exit(f"dpdl: {error}")
