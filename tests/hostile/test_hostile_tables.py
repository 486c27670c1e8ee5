"""Parquet, arrow and tar archives from the adversary."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antibackdoor.data.load import load
from hostile_files import Case, array, encoded, png, refused, sparse, tarred, written

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
IMAGE = encoded()


def table(form: str = "parquet", **columns: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        made = pa.table(columns)
        if form == "parquet":
            pq.write_table(made, path.with_suffix(".parquet"))
        else:
            with pa.ipc.new_file(path.with_suffix(".arrow"), made.schema) as writer:
                writer.write_table(made)
        return path.with_suffix(f".{form}")

    return make


def repeated(path: Path) -> Path:
    """One row a hundred thousand times, in a few kilobytes."""
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**5, np.int32)), pa.array([IMAGE]))
    pq.write_table(
        pa.table({"image": rows.cast(pa.binary()), "label": np.zeros(10**5, np.int64)}), path.with_suffix(".parquet")
    )
    return path.with_suffix(".parquet")


def changed(form: str, place: int, value: bytes) -> Callable[[Path], Path]:
    """Some bytes of an honest table overwritten, counted from the end where negative."""

    def make(path: Path) -> Path:
        made = table(form, series=[[1.0, 2.0], [2.0, 3.0]], label=[0, 1])(path)
        content = bytearray(made.read_bytes())
        at = place % len(content)
        content[at : at + len(value)] = value
        return written(made, bytes(content))

    return make


def cut(form: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        made = table(form, series=[[1.0, 2.0], [2.0, 3.0]], label=[0, 1])(path)
        return written(made, made.read_bytes()[:-20])

    return make


def saved(state: object, **files: bytes) -> Callable[[Path], Path]:
    """A folder as `save_to_disk` writes it."""

    def make(path: Path) -> Path:
        path.mkdir()
        text = state if isinstance(state, str) else json.dumps(state)
        for name, content in {"state__json": text.encode(), **files}.items():
            written(path / name.replace("__", "."), content)
        return path

    return make


def linked(path: Path) -> Path:
    honest = table("arrow", series=[[1.0, 2.0], [2.0, 3.0]], label=[0, 1])(path.with_name("outside"))
    saved({"_data_files": [{"filename": "data.arrow"}]})(path)
    (path / "data.arrow").symlink_to(honest)
    return path


def split_linked(path: Path) -> Path:
    linked(path.with_name("other"))
    saved({})(path)
    (path / "state.json").unlink()
    written(path / "dataset_dict.json", json.dumps({"splits": ["train"]}))
    (path / "train").symlink_to(path.with_name("other"))
    return path


NOTHING = pa.list_(pa.float32(), 0)


def nothing(count: int, kind: Any = NOTHING) -> Any:
    """So many lists of no numbers, which are stored in no bytes."""
    inner = pa.array([], pa.float32()) if kind == NOTHING else nothing(count * kind.list_size)
    return pa.Array.from_buffers(kind, count, [None], children=[inner])


def packed(path: Path) -> Path:
    """Five million labels in some kilobytes."""
    made = pa.table({"series": pa.nulls(5_000_000, pa.list_(pa.float32())), "label": np.zeros(5_000_000, np.int8)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(path.with_suffix(".arrow"), made.schema, options=options) as writer:
        writer.write_table(made)
    return path.with_suffix(".arrow")


def unpacking(path: Path) -> Path:
    """Two hundred megabytes of zeros, compressed, in few rows."""
    made = pa.table({"series": pa.array([np.zeros(2_500_000)] * 10), "label": [0, 1] * 5})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(path.with_suffix(".arrow"), made.schema, options=options) as writer:
        writer.write_table(made)
    return path.with_suffix(".arrow")


def forgotten(path: Path) -> Path:
    """The directory of another file, which has one batch more."""
    few, many = (table("arrow", series=[[1.0]] * n, label=[0] * n)(path.with_name(f"{n}")) for n in (1, 2))
    made = pa.ipc.open_file(pa.memory_map(str(many)))
    with pa.ipc.new_file(path.with_suffix(".arrow"), made.schema) as writer:
        writer.write_batch(made.get_batch(0))
        writer.write_batch(made.get_batch(0))
    content = path.with_suffix(".arrow").read_bytes()
    footer = content[-int.from_bytes(content[-10:-6], "little") - 10 :]
    body = few.read_bytes()
    return written(path.with_suffix(".arrow"), body[: -int.from_bytes(body[-10:-6], "little") - 10] + footer)


def shared(path: Path) -> Path:
    """An image that the file holds once and that stands in four hundred rows."""
    image = pa.array([np.random.default_rng(0).bytes(400_000)], pa.binary())
    rows = pa.DictionaryArray.from_arrays(np.zeros(400, np.int32), image)
    made = pa.table({"image": rows, "label": np.zeros(400, np.int64)})
    pq.write_table(made, path.with_suffix(".parquet"), store_schema=False)
    return path.with_suffix(".parquet")


def counted(path: Path) -> Path:
    """The page of the labels tells of a billion of them."""
    made = pa.table({"series": [[1.0, 2.0]] * 2, "label": [0, 1]})
    pq.write_table(made, path.with_suffix(".parquet"), use_dictionary=False, compression="none")
    before, behind = path.with_suffix(".parquet").read_bytes().rsplit(b"\x2c\x15\x04", 1)
    return written(path.with_suffix(".parquet"), before + b"\x2c\x15\x80\xa8\xd6\xb9\x07" + behind)


NESTED = pa.array([[[[1.0]]], [[[2.0]]]])
BAD = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 2)
TABLES: dict[str, Case] = {
    "lists four deep": (table(series=NESTED, label=[0, 1]), "needs one column of encoded images or of lists"),
    "maps": (
        table(series=pa.array([[("a", 1.0)]] * 2, pa.map_(pa.string(), pa.float64())), label=[0, 1]),
        "one column of",
    ),
    "structs of lists": (table(series=[{"a": [1.0]}, {"a": [2.0]}], label=[0, 1]), "needs one column of"),
    "lists of text": (table(series=[["a"], ["b"]], label=[0, 1]), "needs one column of"),
    "labels are lists": (table(series=[[1.0], [2.0]], label=[[0], [1]]), "of type list<.*> holds no labels"),
    "labels are structs": (
        table(series=[[1.0], [2.0]], label=[{"a": 0}, {"a": 1}]),
        "of type struct<.*> holds no labels",
    ),
    "labels are shares in a table": (table(series=[[1.0], [2.0]], label=[0.5, 1.0]), "of type double holds no labels"),
    "labels are missing": (table(series=[[1.0], [2.0]], label=[0, None]), "holds no label"),
    "labels beyond 63 bits": (
        table(series=[[1.0], [2.0]], label=pa.array([0, 2**64 - 1], pa.uint64())),
        "label beyond 63 bits",
    ),
    "label of 5,000 characters in a table": (table(series=[[1.0], [2.0]], label=["a", "b" * 5000]), "5,000 characters"),
    "no label column": (table(series=[[1.0], [2.0]]), "needs one column of labels"),
    "no sample column": (table(label=[0, 1]), "needs one column of encoded images"),
    "no columns": (table(), "needs one column of labels"),
    "ragged channels": (table(series=[[[1.0, 2.0], [1.0]], [[1.0], [2.0]]], label=[0, 1]), "is no series"),
    "empty lists": (table(series=pa.array([[], []], pa.list_(pa.float64())), label=[0, 1]), "is no series"),
    "missing lists": (table(series=[None, [1.0]], label=[0, 1]), "is no series"),
    "paths in place of images": (table(image=BAD, label=[0, 1]), "holds no image itself"),
    "empty images": (table(image=[b"", b""], label=[0, 1]), "2 of 2 images"),
    "images of 60000x60000": (table(image=[png(60000, 60000, pixels=b"")] * 2, label=[0, 1]), r"pixels\)? .*limit"),
    "pickles in place of images": (table(image=[b"\x80\x04cos\nsystem\n."] * 2, label=[0, 1]), "2 of 2 images"),
    "one image a hundred thousand times": (repeated, "declares 100,000 rows in .* it is a bomb"),
    "twenty million zeros in a kilobyte": (
        table(series=pa.array([np.zeros(20_000_000)]), label=[0]),
        r"would take 153 MiB, \d+,\d+ times its size; it is a bomb",
    ),
    "a page that tells of a billion values": (
        counted,
        r"would take 7,629 MiB, \d+,\d+,\d+ times its size; it is a bomb",
    ),
    "lists of nothing": (table("arrow", series=nothing(2), label=[0, 1]), "needs one column of encoded images or of"),
    "lists of lists of nothing": (
        table("arrow", series=nothing(2, pa.list_(NOTHING, 5)), label=[0, 1]),
        "needs one column of encoded images or of",
    ),
    "five million rows of nothing": (
        table("arrow", series=nothing(5_000_000), label=pa.nulls(5_000_000)),
        "column 'label' of type null holds no labels",
    ),
    "five million labels in some kilobytes": (packed, "declares 5,000,000 rows in .* bytes; it is a bomb"),
    "two hundred megabytes in some kilobytes": (unpacking, "set.arrow would take 191 MiB, .* times its size"),
    "arrow whose directory tells of more": (forgotten, "its directory lists 2 batches, but it holds 1"),
    "images that are lists of nothing": (
        table("arrow", image=[{"bytes": [None] * 3}] * 2, label=[0, 1]),
        "needs one column of encoded images",
    ),
    "one image in every row": (shared, "each row that shows it, would take .* it is a bomb"),
    "one label of a megabyte in every row": (
        table("arrow", series=[[1.0]] * 9, label=pa.DictionaryArray.from_arrays(np.zeros(9, np.int32), ["a" * 10**6])),
        "row 0 of column 'label' has a name of 1,000,000 characters",
    ),
    "column name with a terminal escape": (table(**{"\x1b[2J": [1, 2]}), r"its columns are \\x1b\[2J"),
    "parquet cut off": (cut("parquet"), "Parquet magic bytes not found in footer"),
    "arrow cut off": (cut("arrow"), "Not an Arrow file"),
    "parquet whose footer lies": (
        lambda path: written(path.with_suffix(".parquet"), b"PAR1" + b"\xff" * 60 + b"\xff\xff\xff\x7fPAR1"),
        "smaller than the size reported by footer",
    ),
    "parquet whose footer is nothing": (
        lambda path: written(path.with_suffix(".parquet"), b"PAR1" + bytes(60) + b"\x3c\0\0\0PAR1"),
        "Couldn't deserialize thrift",
    ),
    "arrow whose footer lies": (
        changed("arrow", -30, b"\x7f" * 20),
        "Verification of flatbuffer-encoded Footer failed",
    ),
    "empty parquet": (lambda path: written(path.with_suffix(".parquet"), b""), "Parquet file size is 0 bytes"),
    "empty arrow": (lambda path: written(path.with_suffix(".arrow"), b""), "Tried reading schema message, was null"),
    "a terabyte of parquet": (
        lambda path: sparse(path.with_suffix(".parquet"), 2**40, b"PAR1"),
        "Parquet magic bytes not found in footer",
    ),
    "state that is no JSON": (saved("{"), "cannot read .*state.json"),
    "state nested without end": (saved("[" * 200_000), "nested too deeply"),
    "state that names nothing": (saved({}), "does not name the files"),
    "state that names a path": (saved({"_data_files": [{"filename": "../../etc/passwd"}]}), "does not name the files"),
    "state that names a number": (saved({"_data_files": [{"filename": 3}]}), "does not name the files"),
    "state whose files are a number": (saved({"_data_files": 1}), "does not name the files"),
    "state that names itself": (saved({"_data_files": [{"filename": ".."}]}), "cannot read .*is a directory"),
    "state with an indirection": (saved({"_indices_data_files": [{"filename": "i.arrow"}]}), "flatten_indices"),
    "file that is a link": (linked, "link out of the data set"),
    "split that is a link": (split_linked, "link out of the data set"),
}


@pytest.mark.parametrize("case", TABLES)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    make, sentence = TABLES[case]
    path = make(tmp_path / "set")
    refused(lambda: load(path), sentence)


def raw(path: Path, *members: tarfile.TarInfo, content: bytes = b"") -> Path:
    """An archive of these headers, whatever they say."""
    path = path.with_suffix(".tar")
    blocks = b"".join(member.tobuf(tarfile.GNU_FORMAT) for member in members)
    return written(path, blocks + content + bytes(-len(blocks + content) % 512) + bytes(1024))


def info(name: str, **others: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in others.items():
        setattr(made, key, value)
    return made


def packed(path: Path) -> Path:
    made = tarred(path, ("a.png", IMAGE), ("a.cls", b"0"))
    out = io.BytesIO()
    import gzip

    with gzip.GzipFile(fileobj=out, mode="wb") as file:
        file.write(made.read_bytes())
    return written(made, out.getvalue())


def labeled(*label: tuple[str, bytes]) -> Callable[[Path], Path]:
    return lambda path: tarred(path, ("a.png", IMAGE), *label)


def holes(path: Path) -> Path:
    """Files that are hardly there, but long."""
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for key in range(9):
            told = tarfile.TarInfo(f"{key}.npy")
            told.pax_headers = {"GNU.sparse.size": "60000000", "GNU.sparse.map": "0,0", "GNU.sparse.numblocks": "1"}
            archive.addfile(told)
    return path.with_suffix(".tar")


HUGE_SHAPE = (
    b"\x93NUMPY\x01\x00\x4e\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(77)
    + b"\n"
)
SHARDS: dict[str, Case] = {
    "empty shard": (lambda path: written(path.with_suffix(".tar"), b""), "no whole tar archive"),
    "text in place of a shard": (lambda path: written(path.with_suffix(".tar"), b"x" * 5120), "no whole tar archive"),
    "compressed shard": (packed, "no whole tar archive"),
    "shard of nothing": (lambda path: written(path.with_suffix(".tar"), bytes(10240)), "holds no samples"),
    "shard cut off": (
        lambda path: written(tarred(path, ("a.png", IMAGE)), tarred(path, ("a.png", IMAGE)).read_bytes()[:512]),
        "no whole tar archive",
    ),
    "member of a terabyte": (
        lambda path: raw(path, info("a.png", size=2**40)),
        "'a.png' declares more bytes than the archive has",
    ),
    "member larger than the archive": (
        lambda path: raw(path, info("a.png", size=2**20)),
        "'a.png' declares more bytes than the archive has",
    ),
    "members with holes of 60 megabytes": (
        holes,
        "'0.npy' declares more bytes than the archive has",
    ),
    "member of negative size": (
        lambda path: raw(path, info("a.png", size=-512)),
        "the sample 'a' has no label",
    ),
    "links": (
        lambda path: raw(
            path,
            info("a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            info("a.cls", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        ),
        "holds no samples",
    ),
    "devices": (
        lambda path: raw(path, info("a.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
        "holds no samples",
    ),
    "pipes": (lambda path: raw(path, info("a.png", type=tarfile.FIFOTYPE)), "holds no samples"),
    "sample without a label": (labeled(), "has no label"),
    "label without a sample": (lambda path: tarred(path, ("a.cls", b"0")), "has no image and no .npy"),
    "two samples of one key": (
        lambda path: tarred(path, ("a.png", IMAGE), ("a.jpg", IMAGE), ("a.cls", b"0")),
        "several samples",
    ),
    "key twice": (
        lambda path: tarred(
            path, ("a.png", IMAGE), ("a.cls", b"0"), ("b.png", IMAGE), ("b.cls", b"0"), ("a.png", IMAGE)
        ),
        "twice",
    ),
    "label that is no text": (labeled(("a.cls", b"\xff\xfe")), "holds no label"),
    "label of nothing": (labeled(("a.cls", b"")), "holds no label"),
    "label of 5,000 characters in a shard": (labeled(("a.cls", b"x" * 5000)), "name of 5,000 characters"),
    "JSON nested without end": (labeled(("a.json", b"[" * 200_000)), "holds no label"),
    "JSON without a label": (labeled(("a.json", b'{"x": 1}')), "holds no label"),
    "JSON whose label is a list": (labeled(("a.json", b'{"label": [1]}')), "holds no label"),
    "JSON whose label is a truth value": (labeled(("a.json", b'{"label": true}')), "holds no label"),
    "pickled array": (
        lambda path: tarred(path, ("a.npy", array(np.array([{}], dtype=object))), ("a.cls", b"0")),
        "sample 'a' cannot be read: it holds pickled Python objects",
    ),
    "array that declares 700 TiB": (
        lambda path: tarred(path, ("a.npy", HUGE_SHAPE), ("a.cls", b"0")),
        "sample 'a' cannot be read: it declares more values than its 88 bytes hold",
    ),
    "array of text": (lambda path: tarred(path, ("a.npy", array(np.array(["a"]))), ("a.cls", b"0")), "is no series"),
    "array of five axes": (
        lambda path: tarred(path, ("a.npy", array(np.zeros((1,) * 5))), ("a.cls", b"0")),
        "is no series",
    ),
    "images and arrays": (
        lambda path: tarred(path, ("a.png", IMAGE), ("a.cls", b"0"), ("b.npy", array(np.zeros(3))), ("b.cls", b"1")),
        "some samples are images",
    ),
    "image of 60000x60000 in a shard": (
        lambda path: tarred(path, ("a.png", png(60000, 60000, pixels=b"")), ("a.cls", b"0")),
        r"pixels\)? .*limit",
    ),
    "member that leads out, damaged": (
        lambda path: tarred(path, ("../../etc/a.png", b"no image"), ("../../etc/a.cls", b"0")),
        r"1 of 1 images.*\.\./\.\./etc/a",
    ),
    "member with a terminal escape": (
        lambda path: tarred(path, ("\x1b[2J.png", b"no image"), ("\x1b[2J.cls", b"0")),
        r"1 of 1 images.*\\x1b\[2J",
    ),
    "key of 5,000 characters": (
        lambda path: tarred(path, ("k" * 5000 + ".png", IMAGE), ("k" * 5000 + ".cls", b"0")),
        "longer than 4,096",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_bad_shards(tmp_path: Path, case: str) -> None:
    make, sentence = SHARDS[case]
    path = make(tmp_path / "set")
    refused(lambda: load(path), sentence)
    assert {child.name for child in tmp_path.iterdir()} == {path.name}  # nothing was unpacked
