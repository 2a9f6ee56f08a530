"""The trunk: weights found, verified and mapped; stages; batch norms folded."""

import copy
import hashlib
import shutil
from pathlib import Path

import cv2
import pytest
import timm
import torch
from timm.layers import Conv2dSame

from dpdl_core import features
from dpdl_core.features import PACKAGE_TRUNK, Trunk, WeightsUnavailable, load_network

data = pytest.importorskip("skimage.data")


def chelsea() -> torch.Tensor:
    square = cv2.resize(data.chelsea()[:, 75:375], (224, 224))
    return torch.from_numpy(square)[None]


def test_package_weights_classify_a_cat():
    """Oracle: ImageNet class 285, Egyptian cat. A wrong order of tensors would say anything."""
    pytest.importorskip(features.PACKAGE_MODULE)
    network = load_network(PACKAGE_TRUNK, "package").eval()
    x = (chelsea().permute(0, 3, 1, 2).float() - 127) / 128
    with torch.inference_mode():
        assert network(x).argmax().item() == 285


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("side", [64, 75])
def test_folding_changes_speed_only(name, side):
    torch.manual_seed(0)
    trunk = Trunk(name)
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that are not 0 and 1
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    images = torch.randint(256, (3, side, side, 3), dtype=torch.uint8)
    with torch.inference_mode():
        plain = trunk(images)
        folded = copy.deepcopy(trunk).fuse()
        fused = folded(images)
    assert len(plain) > 1
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert not any(type(m) is Conv2dSame for m in folded.modules())


def test_a_network_whose_norms_run_elsewhere_than_they_stand_keeps_them():
    """RepViT defines a norm behind a convolution that runs after the sum of three branches."""
    torch.manual_seed(0)
    trunk = Trunk("repvit_m0_9", image_size=64)
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    images = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        plain = trunk(images)
        for a, b in zip(plain, trunk.fuse()(images), strict=True):
            torch.testing.assert_close(a, b)
    # Of fresh weights too, into which a saved trunk is read back.
    assert trunk.state_dict().keys() == Trunk("repvit_m0_9").fuse().state_dict().keys()


def test_stages_of_lite0_are_its_seven_blocks():
    assert Trunk(PACKAGE_TRUNK).channels == [16, 24, 40, 80, 112, 192, 320]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("ghostnet_050", "blocks"),  # an activation of its own behind the stem's norm
        ("repghostnet_050", "blocks"),
        ("tf_efficientnet_lite0", "blocks"),
        ("test_resnet", "layer4"),
    ],
)
def test_stages_one_after_the_other_are_the_network(name, last):
    """Oracle: timm's own forward."""
    network = load_network(name, "random").eval()
    x, found = torch.randn(2, 3, 64, 64), []
    getattr(network, last).register_forward_hook(lambda module, args, out: found.append(out))
    with torch.inference_mode():
        network.forward_features(x)
        for stage in features._cut(network):
            x = stage(x)
    assert torch.equal(x, found[0])


def test_a_path_gives_what_was_saved(tmp_path):
    network = timm.create_model("test_resnet", pretrained=False)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded = load_network("test_resnet", str(tmp_path / "weights.pth"))
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


def test_files_from_before_norms_counted_their_batches_are_read(tmp_path):
    """torchvision's published resnet18 is such a one: 102 tensors of 122."""
    state = timm.create_model("resnet18.tv_in1k", pretrained=False).state_dict()
    old = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    assert (len(state), len(old)) == (122, 102)
    for name, renamed in (("by_name", old), ("by_order", {f"o.{k}": t for k, t in old.items()})):
        torch.save(renamed, tmp_path / f"{name}.pth")
        loaded = load_network("resnet18.tv_in1k", str(tmp_path / f"{name}.pth")).state_dict()
        assert all(torch.equal(old[key], loaded[key]) for key in old)


def test_other_names_in_the_same_order_are_mapped(tmp_path):
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    renamed = {f"other.{i}": t for i, t in enumerate(state.values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    loaded = load_network("test_resnet", str(tmp_path / "renamed.pth")).state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_a_damaged_file_is_told_by_its_name(tmp_path):
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    good, bad = tmp_path / f"w-{digest}.pth", tmp_path / "w-00000000.pth"
    shutil.copy(tmp_path / "w.pth", good)
    shutil.copy(tmp_path / "w.pth", bad)
    load_network("test_resnet", str(good))
    with pytest.raises(WeightsUnavailable, match="damaged"):
        load_network("test_resnet", str(bad))


@pytest.mark.parametrize("weights", ["/no/such/file.pth", "package"])
def test_without_weights_three_ways_are_listed(weights):
    with pytest.raises(WeightsUnavailable) as told:
        load_network("test_resnet", weights)
    for way in ("weights=PATH", "weights=package", "weights=hub"):
        assert way in str(told.value)


def test_weights_of_another_network_are_refused(tmp_path: Path):
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsUnavailable, match="this very network"):
        load_network("test_resnet", str(tmp_path / "w.pth"))


def test_a_transformer_is_looked_at_in_the_size_of_the_images():
    assert Trunk("vit_tiny_patch16_224", image_size=224).channels == [192] * 12
    assert Trunk("vit_tiny_patch16_224").channels == [192] * 12
    with pytest.raises(ValueError, match=r"no images of 448 px .* set image_size=224"):
        Trunk("vit_tiny_patch16_224", image_size=448)


def test_an_unknown_trunk_is_named():
    with pytest.raises(ValueError, match="no_such_net"):
        Trunk("no_such_net")
