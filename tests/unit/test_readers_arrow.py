import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from antibackdoor.data import arrow
from antibackdoor.data.load import load, load_samples
from antibackdoor.errors import InputError

pa = pytest.importorskip("pyarrow", reason="the extra `hf` is not installed")
pq = pytest.importorskip("pyarrow.parquet")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (6, 10, 8, 3), dtype=np.uint8)
NAMES = ["zebra", "ant", "cat"]
FEATURES = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}}}


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def table(columns, features=None):
    made = pa.table(columns)
    return made.replace_schema_metadata({"huggingface": json.dumps(features)}) if features else made


def images(n=6):
    structs = [{"bytes": png(PIXELS[k]), "path": f"{k}.png"} for k in range(n)]
    return table({"image": structs, "label": [k % 3 for k in range(n)]}, FEATURES)


def stream(path, made):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=4)
    return path


def file(path, made):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=4)
    return path


def parquet(path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=4)
    return path


@pytest.mark.parametrize("write", [parquet, stream, file])
def test_images(tmp_path, write):
    data = load(write(tmp_path / ("set.parquet" if write is parquet else "set.arrow"), images())).train
    assert data.spec.shape == (3, 10, 8) and data.spec.classes == tuple(NAMES)  # in the order of their numbers
    assert data.y.tolist() == [0, 1, 2, 0, 1, 2] and data.ids == [str(k) for k in range(6)]
    assert torch.equal(data.x[torch.arange(6)], torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()))


def test_folder_of_a_hub_repository(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", images())
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", images(3))
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", images(3))
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", images(4))
    splits = load(tmp_path)
    assert len(splits.train) == 9 and len(splits.test) == 3 and splits.train.ids[8] == "8"
    assert load(tmp_path, image_size=5).train.spec.shape == (3, 5, 5)
    with pytest.raises(InputError, match="is not a number of pixels"):
        load(tmp_path, image_size=(0, 4))
    samples, names = load_samples(tmp_path, splits.train.spec)
    assert len(samples) == 3 and names == NAMES


def test_series(tmp_path):
    rows = [RNG.normal(size=(2, 7 - k % 2)).astype(np.float32).tolist() for k in range(6)]
    made = table({"values": rows, "label": ["b", "a", "b", "a", "b", "a"], "note": ["x"] * 6})
    data = load(parquet(tmp_path / "set.parquet", made)).train
    assert data.spec.shape == (2, 7) and data.spec.classes == ("a", "b") and data.y[:2].tolist() == [1, 0]
    assert data.lengths.tolist() == [7, 6] * 3
    assert torch.allclose(data.x[torch.tensor([1])][0, :, :6], torch.tensor(rows[1]))
    flat = load(parquet(tmp_path / "flat.parquet", table({"x": [r[0] for r in rows], "y": [3, 5] * 3}))).train
    assert flat.spec.shape == (1, 7) and flat.spec.classes == ("3", "5")


def test_what_the_library_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    made = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in PIXELS], "label": [0, 1, 2, 0, 1, 2]}, features=features
    )
    made.save_to_disk(tmp_path / "one", num_shards=2)
    one = load(tmp_path / "one").train
    assert one.spec.classes == tuple(NAMES) and one.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(one.x[torch.arange(6)], torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()))
    datasets.DatasetDict({"train": made, "test": made.select([4, 2])}).save_to_disk(tmp_path / "both")
    both = load(tmp_path / "both")
    assert both.train.fingerprint() == one.fingerprint() and both.test.y.tolist() == [1, 2]
    made.to_parquet(tmp_path / "set.parquet")
    assert load(tmp_path / "set.parquet").train.fingerprint() == one.fingerprint()
    curves = {"series": RNG.normal(size=(4, 2, 9)).tolist(), "label": [1, 0, 1, 0]}
    datasets.Dataset.from_dict(curves).save_to_disk(tmp_path / "curves")
    assert load(tmp_path / "curves").train.spec.shape == (2, 9)


BYTES = [png(PIXELS[0])] * 2


@pytest.mark.parametrize(
    ("columns", "features", "gist"),
    [
        ({"image": BYTES}, None, "one column of labels.*columns are image"),
        ({"label": [0, 1]}, None, "one column of encoded images"),
        ({"a": [[1.0], [2.0]], "b": [[1.0], [2.0]], "label": [0, 1]}, None, "one column of encoded images.*a .list"),
        ({"x": [1.0, 2.0], "label": [0, 1]}, None, "one column of encoded images"),
        ({"image": BYTES, "label": [0.5, 1.0]}, None, "of type double holds no labels"),
        ({"image": BYTES, "label": [0, None]}, None, "row 1 of column 'label' holds no label: None"),
        ({"image": BYTES, "label": [0, 3]}, FEATURES, "sample '1' has label 3, outside 0..2"),
        ({"image": BYTES, "label": [0, -1]}, FEATURES, "label -1, outside"),
        ({"image": [b"nonsense", BYTES[0]], "label": [0, 1]}, None, "1 of 2 images in .* cannot be read .0: cannot"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 2, "label": [0, 1]}, None, "holds no image itself"),
        ({"x": [[1.0, 2.0], []], "label": [0, 1]}, None, "sample '1' is no series"),
        ({"x": [[1.0, 2.0], None], "label": [0, 1]}, None, "row 1 of column 'x' is no series"),
        ({"x": [[[1.0, 2.0], [1.0]]] * 2, "label": [0, 1]}, None, "row 0 of column 'x' is no series"),
        ({"x": [[1.0, float("inf")], [1.0, 2.0]], "label": [0, 1]}, None, "infinite"),
        ({"x": [[1.0, 2.0]] * 0, "label": [1] * 0}, None, "of type null holds no labels"),
    ],
)
def test_bad_tables(tmp_path, columns, features, gist):
    with pytest.raises(InputError, match=gist):
        load(parquet(tmp_path / "set.parquet", table(columns, features)))


def test_unreadable_images_can_be_left_out(tmp_path):
    made = table({"image": [BYTES[0], b"nonsense", BYTES[0]], "label": [0, 1, 1]})
    with pytest.warns(UserWarning, match="left out"):
        data = load(parquet(tmp_path / "set.parquet", made), skip_unreadable=True).train
    assert data.ids == ["0", "2"] and data.y.tolist() == [0, 1]


@pytest.mark.parametrize("write", [parquet, stream, file])
def test_damage(tmp_path, write):
    path = write(tmp_path / ("set.parquet" if write is parquet else "set.arrow"), images())
    whole = path.read_bytes()
    for end in range(0, len(whole), max(len(whole) // 40, 1)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cannot read|holds no"):
            load(path)
    rng = np.random.default_rng(1)
    for _ in range(40):  # anything but a crash or another error
        torn = bytearray(whole)
        for place in rng.integers(0, len(whole), 6):
            torn[place] = rng.integers(256)
        path.write_bytes(torn)
        try:
            load(path)
        except InputError as error:
            assert str(error)


@pytest.mark.parametrize("change", [lambda batches: batches[:-1], lambda batches: [*batches, batches[0]]])
def test_columns_of_a_damaged_file_differ_in_length(tmp_path, monkeypatch, change):
    real = arrow._batches
    monkeypatch.setattr(
        arrow, "_batches", lambda path, name: change(list(real(path, name))) if name == "image" else real(path, name)
    )
    with pytest.raises(InputError, match=r"'label' and 'image' differ in length\.$"):
        load(parquet(tmp_path / "set.parquet", images()))


def test_names_in_a_saved_set_cannot_lead_out(tmp_path):
    parquet(tmp_path / "outside.parquet", images())
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("../outside.parquet", "/etc/passwd", 3, None):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(InputError, match="does not name the files"):
            load(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(InputError, match="does not exist"):
        load(folder)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../.."]}))
    with pytest.raises(InputError, match="does not name the splits"):
        load(folder)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train.parquet").symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(InputError, match="link out of the data set"):
        load(tmp_path / "links")
