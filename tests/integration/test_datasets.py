"""Import into a real S3 and streaming readers over it."""

import hashlib
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app as cli
from dpdl_core.images import decode_image
from infra.answers import is_answer
from infra.errors import DataError
from infra.s3_client import make_filesystem, make_minio
from pipelines import datasets, sources
from pipelines.dataset_index import check_snapshot, incoming, list_objects, load_index
from pipelines.datasets import NewImage, import_dataset, iter_images, labels, put_incoming
from pipelines.held_out import images, usable
from pipelines.people import data_of_training, repeated, said
from pipelines.sources import StreamedImages, digests, read_columns, read_here, row_groups

pytestmark = [pytest.mark.integration, pytest.mark.storage]


def texture(seed, spot=False):
    """A 64 x 64 PNG of grey noise; with a bright square where it is a defect."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(120, 12, (64, 64)).clip(0, 255).astype(np.uint8)
    if spot:
        x, y = rng.integers(8, 40, 2)
        pixels[y : y + 14, x : x + 14] = 235
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "plates"
    for kind, count, spot in (("normal", 48, False), ("anomaly/spot", 16, True)):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            (root / kind / f"{i:03}.png").write_bytes(texture(i + 1000 * spot, spot))
    (root / "normal" / "broken.png").write_bytes(texture(1)[:300])
    (root / "normal" / "empty.png").write_bytes(b"")
    (root / "normal" / "twice.png").write_bytes(texture(1))
    return root


def test_import_keeps_bytes_splits_without_overlap_and_lists_what_it_left_out(settings, folder):
    report = import_dataset(settings, folder, "plates", shots=4)
    reasons = {entry["source"]: entry["reason"] for entry in report.skipped}
    assert reasons.pop("normal/twice.png") == "duplicate of normal/001.png"
    assert set(reasons) == {"normal/broken.png", "normal/empty.png"}
    assert set(reasons.values()) <= {"empty", "truncated", "corrupt"}
    stored = {}
    for split in ("train", "calibration", "test"):
        for source, data in iter_images(settings, "plates", split):
            assert source not in stored
            stored[source] = data
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    assert stored == {k: v for k, v in files.items() if k not in {*reasons, "normal/twice.png"}}
    counts = report.counts
    assert counts["train"]["anomaly"] == 4
    assert counts["calibration"]["anomaly"] == 0
    assert counts["test"]["anomaly"] == 12
    found = labels(settings, "plates", "test")
    assert sum(label for label, _ in found.values()) == 12
    assert all(label == ("spot" in source) for source, (label, _) in found.items())


def test_the_same_import_writes_the_same_objects_and_another_one_leaves_no_old_ones(
    settings, folder
):
    import_dataset(settings, folder, "plates", shots=4)
    before = {(o.key, o.etag) for o in list_objects(settings, "plates/")}
    again = import_dataset(settings, folder, "plates", shots=4)
    assert (again.written, again.removed) == (0, 0)
    assert {(o.key, o.etag) for o in list_objects(settings, "plates/")} == before
    other = import_dataset(settings, folder, "plates", shots=2)
    assert other.removed > 0
    index = load_index(settings, "plates")
    listed = {o.key for o in list_objects(settings, "plates/")} - {"plates/dataset.json"}
    assert listed == {part.key for parts in index.parts.values() for part in parts}
    check_snapshot(settings, index)


def test_of_two_imports_of_one_name_at_once_the_second_to_end_is_refused(
    settings, folder, monkeypatch
):
    import_dataset(settings, folder, "twofold", shots=4)
    write, ran = datasets._write_parts, []

    def overtaken(*args):
        yield from write(*args)
        if not ran:
            ran.append(import_dataset)
            import_dataset(settings, folder, "twofold", shots=2, seed=5)

    monkeypatch.setattr(datasets, "_write_parts", overtaken)
    with pytest.raises(DataError, match="another import of that name has ended"):
        import_dataset(settings, folder, "twofold", shots=3, seed=7)
    index = load_index(settings, "twofold")
    assert (index.shots, index.seed) == (2, 5)
    check_snapshot(settings, index)


def test_an_import_killed_before_its_index_leaves_the_old_data_set_readable(
    settings, folder, monkeypatch
):
    import_dataset(settings, folder, "plates", shots=4)
    before = dict(iter_images(settings, "plates", "train"))

    def crash(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.datasets.DatasetIndex", crash)
    with pytest.raises(KeyboardInterrupt):
        import_dataset(settings, folder, "plates", shots=2, seed=5)
    monkeypatch.undo()
    check_snapshot(settings, load_index(settings, "plates"))
    assert dict(iter_images(settings, "plates", "train")) == before


def test_a_lost_object_is_found_before_anything_is_trained_on(settings, folder):
    import_dataset(settings, folder, "plates", shots=4)
    index = load_index(settings, "plates")
    key = index.keys("train")[0]
    make_minio(settings).remove_object(settings.s3.data_bucket, key)
    with pytest.raises(DataError, match="gone: import 'plates' again"):
        check_snapshot(settings, index)
    with pytest.raises(DataError, match="gone"):
        row_groups(settings, [key])


def test_the_reader_gives_the_pixels_of_the_one_decode_path(settings, folder):
    import_dataset(settings, folder, "plates", shots=4)
    keys = load_index(settings, "plates").keys("train", 0)
    source = images(settings, keys, 32)
    got = torch.cat(list(source.batches(5))).numpy()
    want = [decode_image((folder / row.source).read_bytes(), 32) for row in source.rows]
    assert np.array_equal(got, np.stack(want))
    groups = row_groups(settings, keys)
    assert len(groups) >= 8  # so that small sets deal out among workers
    streamed = StreamedImages(
        read_here(settings, groups, 32), 32, expected=source.num_images, cache_bytes=0
    )
    assert np.array_equal(torch.cat(list(streamed.batches(7))).numpy(), got)


def test_incoming_images_are_checked_and_sending_twice_is_one_object(settings, folder):
    import_dataset(settings, folder, "plates", shots=4)
    batch = [NewImage(texture(7), "cam-1", 10**18, "a"), NewImage(texture(8), "cam-2"), b"no image"]
    first = put_incoming(settings, "plates", batch)
    assert first.images == 2
    assert first.skipped == [{"source": "incoming-2", "reason": "not-an-image"}]
    assert put_incoming(settings, "plates", batch).keys == first.keys
    stored = incoming(settings, "plates")
    assert [o.key for o in stored] == first.keys
    source = images(settings, first.keys, 32)
    assert [row.camera for row in source.rows] == ["cam-1", "cam-2"]
    assert put_incoming(settings, "plates", [b""]).keys == []


def test_the_command_takes_normals_of_one_folder_or_fails(settings, folder, tmp_path):
    import_dataset(settings, folder, "plates", shots=4)

    def add(*words):
        return CliRunner().invoke(cli, ["data", "add", str(tmp_path), "--name", "plates", *words])

    (tmp_path / "a.png").write_bytes(b"none")
    assert add().exit_code == 1
    (tmp_path / "nok").mkdir()
    (tmp_path / "nok" / "b.png").write_bytes(texture(5000))
    assert "--recursive" in str(add().exception)
    assert incoming(settings, "plates") == []
    done = add("--recursive")
    assert (done.exit_code, done.stdout) == (0, "1 new normal images for plates\n")


def test_however_many_answers_there_are_they_share_their_connections(settings, folder, monkeypatch):
    import_dataset(settings, folder, "plates", shots=4)
    for i in range(5):
        put_incoming(settings, "plates", [texture(5000 + i)], vouched_by="ann")
    keys = [o.key for o in incoming(settings, "plates")]
    made = []
    monkeypatch.setattr(
        sources, "make_filesystem", lambda given: made.append(1) or make_filesystem(given)
    )
    index = load_index(settings, "plates")
    assert said(settings, index, keys)["answered_by"] == dict.fromkeys(keys, "ann")
    assert repeated(settings, index, used=(), new=keys) == {}
    assert len(made) == 4


def test_an_import_of_one_camera_names_it(settings, folder):
    import_dataset(settings, folder, "plates", shots=4, camera="cam-1")
    keys = load_index(settings, "plates").keys("calibration")
    assert {c for rows in read_columns(settings, keys, ["camera"]) for c in rows["camera"]} == {
        "cam-1"
    }


def test_a_person_may_vouch_for_what_the_sieve_has_set_aside(settings, folder):
    """As by an answer in the console: the same images are new again, and nobody's to set aside."""
    import_dataset(settings, folder, "plates", shots=4)
    batch = [texture(5000 + i, spot=True) for i in range(3)]
    (doubtful,) = put_incoming(settings, "plates", batch).keys
    aside = digests(settings, [doubtful])[doubtful]
    (key,) = put_incoming(settings, "plates", batch, vouched_by="ann").keys
    before = {o.key: o.etag for o in incoming(settings, "plates")}
    assert put_incoming(settings, "plates", batch, vouched_by="bob").keys == [key]
    assert {o.key: o.etag for o in incoming(settings, "plates")} == before
    assert before.keys() == {doubtful, key}
    assert is_answer(key)
    index = load_index(settings, "plates")
    assert said(settings, index, [doubtful, key])["answered_by"] == {key: "ann"}
    assert repeated(settings, index, used=[doubtful], new=[key], set_aside=aside) == {}
    keep = usable({"set_aside": aside})
    assert images(settings, [doubtful], 32, keep).num_images == 0
    assert images(settings, [key], 32, keep).num_images == 3
    assert data_of_training(settings, index)["incoming"] == {key: before[key]}


def test_a_large_folder_arrives_in_parts_and_is_never_held_as_a_whole(
    settings, folder, monkeypatch
):
    import_dataset(settings, folder, "plates", shots=4)
    monkeypatch.setattr(datasets, "PART_ROWS", 4)
    stored = []

    def camera():
        for i in range(10):
            stored.append(len(incoming(settings, "plates")))
            yield NewImage(texture(i), source=f"{i}")

    report = put_incoming(settings, "plates", camera())
    assert (len(report.keys), report.images, report.skipped) == (3, 10, [])
    assert stored == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert {o.key for o in incoming(settings, "plates")} == set(report.keys)
    source = images(settings, report.keys, 32)
    assert sorted(row.source for row in source.rows) == [f"{i}" for i in range(10)]


def test_a_data_set_that_is_not_there_says_how_to_import(settings):
    with pytest.raises(DataError, match="dpdl data import"):
        load_index(settings, "nothing")
    with pytest.raises(DataError, match="lower-case"):
        load_index(settings, "../models")


def test_digests_are_read_where_they_are_written_and_made_where_not(settings, folder):
    import_dataset(settings, folder, "plates", shots=4)
    key = load_index(settings, "plates").keys("train", 0)[0]
    filesystem, path = make_filesystem(settings), f"{settings.s3.data_bucket}/{key}"
    table = pq.read_table(path, filesystem=filesystem)
    found = digests(settings, [key])[key]
    assert found == [hashlib.sha256(image).hexdigest() for image in table["image"].to_pylist()]
    pq.write_table(table.drop_columns(["digest"]), path, filesystem=filesystem)  # an older import
    assert digests(settings, [key]) == {key: found}
