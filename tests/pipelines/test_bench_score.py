"""The benchmark counts every turn, and its ratio is that of its own figures."""

import json
import statistics

import pytest

from pipelines.bench_score import BenchScoreOptions, bench_score

SMALL = {
    "trunk": "test_resnet",
    "weights": "random",
    "image_size": "64",
    "patch_prototypes": "32",
    "patch_dims": "16",
    "patch_side": "4",
}
"""The paper recipe's spaces are those of a trunk with four stages."""


def test_report_is_what_was_timed(tmp_path):
    path = tmp_path / "a" / "bench.json"
    calls = []
    report = bench_score(
        BenchScoreOptions(
            recipe="paper", overrides=SMALL, batch_size=4, repetitions=3, report=path
        ),
        lambda *call: calls.append(call),
    )
    assert json.loads(path.read_text()) == report
    for name in ("timm", "trunk", "score"):
        assert len(report[f"{name}_seconds"]) == 3
        rate = 4 / statistics.median(report[f"{name}_seconds"])
        assert report[f"{name}_images_per_second"] == pytest.approx(rate)
    for ratio, other in (("ratio", "trunk"), ("timm_ratio", "timm")):
        both = report["score_images_per_second"] / report[f"{other}_images_per_second"]
        assert report[ratio] == pytest.approx(both)
    assert report["ratio"] < 1.5  # scoring runs the trunk and more
    assert calls[-1][1] == 1


def test_the_model_measured_has_the_prototypes_that_were_asked_for():
    """64 images of 4 x 4 patches would give 341 of them, and 6 of pooled features."""
    asked = {**SMALL, "patch_prototypes": "400", "pooled_prototypes": "8"}
    options = BenchScoreOptions(recipe="paper", overrides=asked, batch_size=4, repetitions=1)
    sizes = bench_score(options)["prototypes"]
    assert {name.split()[0]: size for name, size in sizes.items()} == {"patch": 400, "pooled": 8}


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"repetitions": 0}])
def test_options_that_cannot_be(change):
    with pytest.raises(ValueError, match="at least 1"):
        BenchScoreOptions(**change)
