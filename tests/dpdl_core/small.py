"""A tiny config, and images with structure: textures that differ from their anomalies."""

import torch

from dpdl_core.config import DpdlConfig, override, recipe

SIZE = 64


def tiny_config(**changes: str) -> DpdlConfig:
    """A few thousand weights, random: what is tested is the machinery, not accuracy."""
    values = {
        "trunk": "test_efficientnet",
        "weights": "random",
        "image_size": str(SIZE),
        "pooled_spaces": "5q,1-5,4qe",
        "patch_spaces": "3-5,4s",
        "patch_prototypes": "12",
        "patch_dims": "8",
        "patch_side": "4",
        "head_stages": "4-5",
        "head_iterations": "20",
        "folds": "3",
    }
    return override(recipe("edge"), values | changes)


def normals(count: int, seed: int = 0) -> torch.Tensor:
    """Soft stripes of random phase, uint8 (count, SIZE, SIZE, 3)."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(count, 1, 1, 1, generator=generator)
    ramp = torch.arange(SIZE).view(1, 1, SIZE, 1) / 6
    noise = 8 * torch.randn(count, SIZE, SIZE, 3, generator=generator)
    stripes = 128 + 60 * torch.sin(ramp + phase) + noise
    return stripes.clamp(0, 255).to(torch.uint8)


def anomalies(count: int, seed: int = 1) -> torch.Tensor:
    """The same with a bright square somewhere."""
    images = normals(count, seed)
    generator = torch.Generator().manual_seed(seed)
    for image in images:
        top, left = torch.randint(SIZE - 24, (2,), generator=generator).tolist()
        image[top : top + 24, left : left + 24] = 255
    return images
