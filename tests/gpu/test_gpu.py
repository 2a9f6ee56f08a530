"""What must be the same on a GPU as on the CPU, and what must work there at all.

Imports dpdl_core only, so it runs where there is no Ray: `python -m pytest tests/gpu`.
"""

import numpy as np
import pytest
import torch

from dpdl_core import artifact
from dpdl_core.augment import cut_paste, dihedral
from dpdl_core.bridge import Bridge
from dpdl_core.codebook import kmeans
from dpdl_core.config import override, recipe
from dpdl_core.fit import fit, renew
from dpdl_core.images import ArraySource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZE = 64
CONFIG = override(
    recipe("edge"),
    {
        "weights": "random",
        "image_size": str(SIZE),
        "patch_prototypes": "64",
        "patch_dims": "32",
        "head_iterations": "20",
        "pseudo_normals": "16",
    },
)


def pictures(count, seed, *, spots=False):
    """Stripes with noise; anomalous ones have a bright square."""
    rng = np.random.default_rng(seed)
    base = 100 + 40 * np.sin(np.arange(SIZE) / 3)[None, :, None, None]
    images = base + rng.normal(0, 8, (count, SIZE, SIZE, 3))
    if spots:
        images[:, 20:36, 20:36] += 90
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    return fit(
        CONFIG, ArraySource(pictures(48, 0)), pictures(4, 1, spots=True), seed=0, device="cuda"
    )


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_the_bridge_is_the_same_on_both(eps):
    generator = torch.Generator().manual_seed(0)
    means, x = (torch.randn(n, 128, generator=generator) for n in (300, 500))
    variances = 0.1 + torch.rand(300, 128, generator=generator)
    here = Bridge(means, variances, torch.full((300,), -np.log(300)), eps)
    there = Bridge(
        means.cuda(), variances.cuda(), torch.full((300,), -np.log(300), device="cuda"), eps
    )
    torch.testing.assert_close(there.energy(x.cuda()).cpu(), here.energy(x), rtol=1e-3, atol=1e-3)
    assert bool((there.transport(x.cuda())[1].cpu() == here.transport(x)[1]).float().mean() > 0.99)


def test_vector_quantisation_is_as_good_on_both():
    rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    here = kmeans(rows, 32, iterations=20, generator=torch.Generator().manual_seed(1))
    there = kmeans(rows.cuda(), 32, iterations=20, generator=torch.Generator().manual_seed(1))
    assert there.means.is_cuda
    assert float(there.inertia) == pytest.approx(float(here.inertia), rel=0.02)


def test_augmentation_stays_on_the_device():
    images = torch.rand(8, 3, SIZE, SIZE, device="cuda")
    generator = torch.Generator().manual_seed(0)
    assert cut_paste(images, generator=generator)[0].is_cuda
    assert dihedral(images, generator=generator).is_cuda


def test_scores_are_the_same_on_both_and_in_any_batch(model):
    images = torch.from_numpy(np.concatenate([pictures(33, 2), pictures(31, 3, spots=True)]))
    on_cpu = artifact.unpack(artifact.pack(model, thresholds={}, metrics={})).model.score(images)
    on_gpu = model.score(images)
    alone = torch.cat([model.score(image[None]).score for image in images])
    torch.testing.assert_close(on_gpu.score.cpu(), on_cpu.score, rtol=2e-2, atol=0.2)
    torch.testing.assert_close(alone, on_gpu.score, rtol=2e-2, atol=0.2)
    assert float(on_gpu.score[33:].min()) > float(on_gpu.score[:33].median())


def test_renewal_works_there(model):
    renewed, report = renew(
        model,
        ArraySource(pictures(48, 0)),
        ArraySource(pictures(24, 4)),
        pictures(4, 1, spots=True),
        seed=0,
        device="cuda",
    )
    assert report.new_normals == 24
    assert bool(renewed.score(torch.from_numpy(pictures(4, 5))).score.isfinite().all())


def test_tuning_in_bf16_stays_finite():
    config = override(
        CONFIG,
        {"tuned_stages": "2", "tune_epochs": "2", "tune_iterations": "4", "tune_prototypes": "8"},
    )
    seen = []
    fit(
        config,
        ArraySource(pictures(48, 0)),
        pictures(4, 1, spots=True),
        seed=0,
        device="cuda",
        progress=lambda stage, share, figures: seen.append((stage, figures)),
    )
    losses = [f["loss"] for stage, f in seen if stage == "tuning" and "loss" in f]
    assert losses
    assert all(np.isfinite(losses))
