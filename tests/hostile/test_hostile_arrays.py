"""`.npz` files and time series files from the adversary."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antibackdoor import limits
from antibackdoor.data.load import load, load_samples
from hostile_files import Case, array, bounded, images_npz, npy, refused, sparse, written, zipped

HEADER = "{{'descr': {!r}, 'fortran_order': False, 'shape': {}, }}"


class Evil:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(Path(os.environ["ANTIBACKDOOR_HOSTILE"]) / "run"),)


def with_x(header: str, body: bytes = bytes(768)) -> Callable[[Path], Path]:
    return lambda path: images_npz(path, x=npy(header, body))


def shaped(shape: str, descr: str = "|u1") -> Callable[[Path], Path]:
    return with_x(HEADER.format(descr, shape))


def members(**others: object) -> Callable[[Path], Path]:
    return lambda path: images_npz(path, **{name: array(value) for name, value in others.items()})


def bomb(method: int) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        with zipfile.ZipFile(path.with_suffix(".npz"), "w", method) as archive, archive.open("x.npy", "w") as member:
            member.write(npy(HEADER.format("|u1", "(800, 100, 100, 1)")))
            for _ in range(8):
                member.write(bytes(10**6))
        return path.with_suffix(".npz")

    return make


def deflated(path: Path, **arrays: np.ndarray) -> Path:
    """An archive of arrays, compressed."""
    return zipped(path.with_suffix(".npz"), {f"{k}.npy": array(v) for k, v in arrays.items()}, zipfile.ZIP_DEFLATED)


def lying_size(path: Path) -> Path:
    """The directory tells of fewer bytes than there are."""
    made = images_npz(path)
    content = bytearray(made.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.index(b"y.npy", content.index(b"PK\x01\x02")))
    content[place + 20 : place + 28] = (10).to_bytes(4, "little") * 2
    return written(made, bytes(content))


def damaged(path: Path) -> Path:
    made = zipped(path.with_suffix(".npz"), {"x.npy": array(np.zeros((4, 8, 8, 3), np.uint8)), "y.npy": array([0, 1])})
    content = bytearray(made.read_bytes())
    content[300] ^= 255
    return written(made, bytes(content))


def as_pickle(path: Path) -> Path:
    return images_npz(path, x=array(np.array([Evil()] * 4, dtype=object)))


LONG = "x" * 5000
NUMBERED = np.arange(4, dtype=np.int64)
ARRAYS: dict[str, Case] = {
    "pickled samples": (as_pickle, "the array 'x' in .*: it holds pickled Python objects, which are never read"),
    "pickled labels": (
        members(y=np.array([0, 1, Evil, 3], dtype=object)),
        "the array 'y' in .*: it holds pickled Python objects",
    ),
    "pickled class names": (
        members(classes=np.array(["a", Evil], dtype=object)),
        "the array 'classes' in .*: it holds pickled Python objects",
    ),
    "pickled ids": (
        members(ids=np.array(["a", "b", "c", Evil], dtype=object)),
        "the array 'ids' in .*: it holds pickled Python objects",
    ),
    "bare pickle as a member": (
        lambda path: images_npz(path, x=b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        "the array 'x' in .*: the magic string is not correct",
    ),
    "declares a petabyte": (
        shaped("(1125899906842624, 1, 1, 1)"),
        "cannot read the array 'x'.*declares more values than its",
    ),
    "declares ten GiB": (
        shaped("(10737418240, 1, 1, 1)"),
        "the array 'x' in .*: it declares more values than its 854 bytes hold",
    ),
    "declares more samples than there are": (
        shaped("(5, 8, 8, 3)"),
        "the array 'x' in .*: it declares more values than its 844 bytes hold",
    ),
    "negative shape": (shaped("(-4, 8, 8, 3)"), "the array 'x' in .*: it declares more values than its"),
    "shape that overflows": (
        shaped("(4294967296, 4294967296, 3)"),
        "the array 'x' in .*: it declares more values than its",
    ),
    "shape of text": (shaped("('a', 8)"), "the array 'x' in .*: shape is not valid"),
    "shape of one hundred axes": (shaped("(" + "1, " * 100 + ")"), "x holds 1 samples, but y has 4"),
    "code as a header": (with_x("__import__('os').system('true')"), "the array 'x' in .*: malformed node or string"),
    "header without an end": (with_x("{" * 60000), "the array 'x' in .*: Header info length .60001. is large"),
    "header of four GiB": (
        lambda path: images_npz(path, x=b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(64)),
        "the array 'x' in .*: EOF: reading array header, expected 4294967295 bytes",
    ),
    "unknown version": (
        lambda path: images_npz(path, x=b"\x93NUMPY\x09\x00" + bytes(64)),
        "the array 'x' in .*: its format has the unknown version 9.0",
    ),
    "record type": (
        with_x(HEADER.format([("a", "<f8"), ("b", "|O")], "(4,)")),
        "the array 'x' in .*: it holds pickled Python objects",
    ),
    "text of a gigabyte an entry": (
        lambda path: images_npz(path, ids=npy(HEADER.format("<U268435456", "(4,)"))),
        "the array 'ids' in .*: it declares more values than its 76 bytes hold",
    ),
    "samples are text": (members(x=np.array(["a"] * 4)), "x must be images"),
    "samples are complex": (members(x=np.zeros((4, 3), complex)), "x must be images"),
    "samples are dates": (members(x=np.zeros((4, 3), "M8[s]")), "x must be images"),
    "samples are a single number": (members(x=np.uint8(3)), "a single number"),
    "samples have no pixels": (members(x=np.zeros((4, 0, 8, 3), np.uint8)), "images must be of shape"),
    "samples have four channels": (members(x=np.zeros((4, 8, 8, 4), np.uint8)), "images must be of shape"),
    "series have no steps": (members(x=np.zeros((4, 1, 0), np.float32)), "x must be images"),
    "labels are shares": (members(y=np.array([0, 1, 0.5, 1])), "y must be one integer"),
    "labels are a table": (members(y=np.zeros((4, 2), np.int64)), "y must be one integer"),
    "labels are negative": (members(y=np.array([0, 1, -1, 1])), "a label is -1; number"),
    "labels beyond 63 bits": (
        members(y=np.array([0, 1, 2**64 - 1, 1], np.uint64)),
        "a label is -1; number the classes",
    ),
    "twenty million samples without a value": (
        with_x(HEADER.format("|u1", "(20000000, 0)"), b""),
        "the array 'x' in .*: it declares more values than its 7. bytes hold",
    ),
    "twenty million names without a letter": (
        lambda path: images_npz(path, ids=npy(HEADER.format("<U0", "(20000000,)"))),
        "the array 'ids' in .*: it declares more values than its 7. bytes hold",
    ),
    "twenty million classes without a letter": (
        lambda path: images_npz(path, classes=npy(HEADER.format("<U0", "(20000000,)"))),
        "the array 'classes' in .*: it declares more values than its 7. bytes hold",
    ),
    "twenty million labels for four samples": (
        lambda path: deflated(path, x=np.zeros((4, 8, 8, 3), np.uint8), y=np.zeros(20_000_000, np.uint8)),
        "x holds 4 samples, but y has 20,000,000",
    ),
    "twenty million samples in some kilobytes": (
        lambda path: deflated(path, x=np.zeros((20_000_000, 1, 1, 1), np.uint8), y=np.zeros(20_000_000, np.uint8)),
        "declares 20,000,000 rows in .* bytes; it is a bomb",
    ),
    "many megabytes of columns in some kilobytes": (
        lambda path: deflated(path, x=np.zeros((1000, 1000, 40, 4), np.uint8).T, y=np.zeros(4, np.uint8)),
        "would take 153 MiB, 1,... times its size; it is a bomb",
    ),
    "names for other samples": (members(ids=np.array(["a", "b"])), "x holds 4 samples, but ids has 2"),
    "names that are a table": (members(ids=np.array([["a", "b"], ["c", "d"]])), "ids must be one name"),
    "names that are shares": (members(ids=np.array([0.5, 1.5, 2.5, 3.5])), "ids must be one name"),
    "a label of two billion": (members(y=np.array([0, 1, 2**31, 1])), "a label is 2147483648"),
    "fewer labels than samples": (members(y=np.array([0, 1])), "x holds 4 samples, but y has 2; give one for each"),
    "classes of one name": (members(classes=np.array(["a", "a"])), "different names"),
    "classes are a table": (members(classes=np.array([["a"], ["b"]])), "a list of different names"),
    "100,001 classes": (members(classes=np.arange(100_001)), "more than the 100,000"),
    "class name of 5,000 characters": (members(classes=np.array(["a", LONG])), "longer than 4,096 characters"),
    "id of 5,000 characters": (members(ids=np.array(["a", "b", "c", LONG])), "longer than 4,096 characters"),
    "ids that repeat": (members(ids=np.array(["a", "a", "b", "c"])), "names some samples twice"),
    "lengths beyond the series": (
        members(x=np.zeros((4, 1, 5), np.float32), lengths=np.array([9, 1, 1, 1])),
        "a length outside 1..5",
    ),
    "negative lengths": (members(x=np.zeros((4, 1, 5), np.float32), lengths=np.array([-1, 1, 1, 1])), "outside 1..5"),
    "lengths are text": (
        members(x=np.zeros((4, 1, 5), np.float32), lengths=np.array(["a"] * 4)),
        "lengths must be one integer for each sample; got <U1",
    ),
    "range that excludes its values": (
        members(x=np.ones((4, 1, 5), np.float32), value_range=np.array([0.0, 0.5])),
        "value_range must be two numbers",
    ),
    "range that is no number": (
        members(x=np.ones((4, 1, 5), np.float32), value_range=np.array([np.nan, np.inf])),
        "value_range must be two numbers that enclose",
    ),
    "infinite values": (members(x=np.full((4, 1, 5), np.inf, np.float32)), "infinite values"),
    "values beyond float32": (members(x=np.full((4, 1, 5), 1e300)), "too large for float32"),
    "nothing but gaps": (members(x=np.full((4, 1, 5), np.nan, np.float32)), "no values at all"),
    "directory that lies about sizes": (lying_size, "the array 'y' in .*: Bad CRC-32"),
    "damaged content": (damaged, "the array 'x' in .*: Bad CRC-32"),
    "no archive": (lambda path: written(path.with_suffix(".npz"), "hello"), "is not an .npz file"),
    "empty file": (lambda path: written(path.with_suffix(".npz"), ""), "is not an .npz file"),
    "end of an archive alone": (
        lambda path: written(path.with_suffix(".npz"), b"PK\x05\x06" + bytes(18)),
        "needs the arrays .* it holds nothing",
    ),
    "ten thousand empty members": (
        lambda path: zipped(path.with_suffix(".npz"), {f"{k}.npy": b"" for k in range(10_001)}),
        "holds 10,001 files; at most 10,000 make sense",
    ),
    "members with paths": (
        lambda path: zipped(path.with_suffix(".npz"), {"../x.npy": b"", "/etc/y.npy": b""}),
        r"it holds \.\./x, /etc/y",
    ),
    "member with a terminal escape": (
        lambda path: zipped(path.with_suffix(".npz"), {"\x1b[2J.npy": b""}),
        r"it holds \\x1b\[2J",
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_arrays(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIBACKDOOR_HOSTILE", str(tmp_path))
    make, sentence = ARRAYS[case]
    path = make(tmp_path / "set")
    refused(lambda: load(path), sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["pickled samples", "declares a petabyte", "samples are a single number"])
def test_bad_arrays_where_they_are_mapped_or_come_without_labels(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTIBACKDOOR_HOSTILE", str(tmp_path))
    path = ARRAYS[case][0](tmp_path / "set")
    refused(lambda: load(path, memory_map=True), ARRAYS[case][1])
    spec = load(images_npz(tmp_path / "honest")).train.spec
    refused(lambda: load_samples(path, spec), ARRAYS[case][1])


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_bombs(tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bomb(method)(tmp_path / "set")
    assert limits.UNPACKED == 2**27
    monkeypatch.setattr(limits, "UNPACKED", 2**22)
    refused(lambda: load(path), r"would take 8 MiB, [\d,]+ times its size; it is a bomb")


def test_arrays_that_would_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda: 500)
    refused(lambda: load(images_npz(tmp_path / "rows")), "for its 4 rows alone, would take")
    monkeypatch.setattr(limits, "memory", lambda: 1024)
    refused(lambda: load(images_npz(tmp_path / "x", x=array(np.zeros((4, 20, 20, 3), np.uint8)))), "x would take")


def test_a_member_that_is_never_asked_for_is_never_unpacked(tmp_path: Path) -> None:
    with bounded():
        assert len(load(images_npz(tmp_path / "set", other=npy(HEADER.format("|u1", "(10000000000000,)")))).train) == 4


def test_special_files(tmp_path: Path) -> None:
    for name in ("set.npz", "set.ts", "set.parquet", "set.tar"):
        os.mkfifo(tmp_path / name)
        refused(lambda name=name: load(tmp_path / name), "pipe, a device or a socket")  # type: ignore[misc]
    refused(lambda: load(Path("/dev/zero")), "pipe, a device or a socket")


HEAD = "@problemName p\n@timeStamps false\n@missing false\n@univariate true\n@equalLength {}\n"
HEAD += "@classLabel true a b\n@data\n"
TS = HEAD.format("true")
ARFF = "@relation r\n@attribute a numeric\n@attribute b numeric\n@attribute c {x,y}\n@data\n"
SERIES: dict[str, tuple[str, str | bytes, str]] = {
    "empty .ts": ("ts", "", "set.ts holds no series"),
    "header alone": ("ts", TS, "set.ts holds no series"),
    "declares a trillion steps": (
        "ts",
        TS.replace("@data", "@seriesLength 999999999999\n@data") + "1,2:a\n1:b\n",
        "case 2 has a different number of observations",
    ),
    "declares no class labels": (
        "ts",
        TS.replace("@classLabel true a b", "@classLabel false") + "1,2\n",
        "no class labels",
    ),
    "declares a regression": (
        "ts",
        TS.replace("@classLabel", "@targetLabel true\n@classLabel") + "1:1\n",
        "no class labels",
    ),
    "declares time stamps": (
        "ts",
        TS.replace("Stamps false", "Stamps true") + "(0,1),(1,2):a\n",
        "holds time stamps, which cannot be read reliably",
    ),
    "time stamps without an end": (
        "ts",
        TS.replace("Stamps false", "Stamps true") + "(" * 20000 + "\n",
        "holds time stamps, which cannot be read reliably",
    ),
    "class label without values": ("ts", TS.replace(" true a b", " true") + "1:a\n", "class values"),
    "class label of nonsense": ("ts", TS.replace("true a b", "perhaps") + "1:a\n", "invalid class label"),
    "data tag with a value": ("ts", TS.replace("@data", "@data x") + "1:a\n", "data tag"),
    "boolean of nonsense": ("ts", TS.replace("@univariate true", "@univariate") + "1:a\n", "boolean value"),
    "one channel long, the others short": (
        "ts",
        HEAD.format("false") + "1," * 20000 + "1" + ":1" * 20000 + ":a\n",
        "line 8 declares 400,040,001 values in 80,004 characters",
    ),
    "channels differ": ("ts", TS + "1,2:a\n1,2:3,4:b\n", "Inconsistent number"),
    "lengths differ where they may not": ("ts", TS + "1,2:a\n1,2,3:b\n", "different number of observations"),
    "words for values": ("ts", TS + "one,two:a\n", "could not convert"),
    "code for values": (
        "ts",
        TS + "__import__('os').system('true'),2:a\n",
        "could not convert string to float: .__import__",
    ),
    "infinite values in a file": ("ts", TS + "inf,2:a\n1,2:b\n", "infinite values"),
    "values beyond float32 in a file": ("ts", TS + "1e300,2:a\n1,2:b\n", "too large for float32"),
    "gaps": ("ts", TS + "?,2:a\n1,2:b\n", "--missing"),
    "series without values": ("ts", HEAD.format("false") + ":a\n1,2:b\n", "could not convert string to float: ''"),
    "series without a label": ("ts", TS + "1,2:\n", "without a label"),
    "label of 5,000 characters": ("ts", TS + "1,2:" + "a" * 5000 + "\n1,2:b\n", "name of 5,000 characters"),
    "label with a terminal escape": ("ts", TS + "1,2:\x1b[2ja\n1:b\n", "case 2 has a different number of observations"),
    "one long series, many short ones": (
        "ts",
        HEAD.format("false") + "1," * 200_000 + "1:a\n" + "1:b\n" * 100_000,
        "padded to its longest series, would take",
    ),
    "bytes that are no text": ("ts", TS.encode() + b"\xff\xfe\x00:a\n", "can't decode byte 0xff"),
    "NUL bytes": ("ts", TS + "\x00" * 1000 + "\n", "holds a series without values"),
    "empty .tsv": ("tsv", "", "set.tsv holds no series"),
    "tsv of labels alone": ("tsv", "1\n2\n", "line 1 has 0 values after its label"),
    "tsv of words": ("tsv", "1\tone\n2\ttwo\n", "line 1: could not convert string to float: 'one'"),
    "ragged tsv": ("tsv", "1\t2\n1\t2\t3\t4\n", "line 2 has 3 values after its label; all lines need the same number"),
    "tsv of five million columns": ("tsv", "1" + "\t" * 5_000_000 + "\n", "line 1 has 5,000,000 values"),
    "tsv without an end of its line": ("tsv", "1" * (2**26 + 2), "line 1 has more than 67,108,864 characters"),
    "ts of ten thousand lines and no data": (
        "ts",
        TS.replace("@data", "@\n" * 10_000),
        "no line @data among its first",
    ),
    "arff of ten thousand lines and no data": (
        "arff",
        ARFF.replace("@data", "@attribute more numeric\n" * 10_000),
        "set.arff holds no series",
    ),
    "a long label on one line of many": (
        "ts",
        TS + "1,2:" + "a" * 4000 + "\n" + "1,2:b\n" * 100_000,
        "the labels of .*, all as long as the longest, would take",
    ),
    "arff whose lines are filled up": (
        "arff",
        ARFF + "1," * 20_000 + "x\n" + "1,x\n" * 20_000,
        "line 7 has another number of values",
    ),
    "arff whose relations are filled up": (
        "arff",
        ARFF.replace("@data", "@attribute r relational\n@data") + "'" + "1," * 3000 + "1" + r"\n1" * 3000 + "',x\n",
        "line 7 declares 9,006,001 values in",
    ),
    "tsv without labels": ("tsv", "\t1\t2\n\t1\t2\n", "without a label"),
    "tsv with a quote that never ends": ("tsv", '1\t"2\t3\n', 'line 1: could not convert string to float: ."2'),
    "empty .arff": ("arff", "", "holds no series"),
    "arff header alone": ("arff", ARFF, "holds no series"),
    "arff of labels alone": ("arff", ARFF + "x\ny\n", "without values"),
    "arff of words": ("arff", ARFF + "one,two,x\n", "could not convert"),
    "ragged arff": (
        "arff",
        ARFF + "1,2,x\n1,2,3,y\n",
        "line 7 has another number of values than the first line of data",
    ),
    "arff that declares relations and has none": (
        "arff",
        "@attribute r relational\n@data\n1,2,x\n",
        "as a .arff file: not enough values",
    ),
    "arff with too many relations": (
        "arff",
        "@attribute r relational\n@data\n'1',x',y',z\n",
        "as a .arff file: too many values",
    ),
    "arff with a formula for a label": ("arff", ARFF + "?,2,=1+1\n", "--missing"),
}


@pytest.mark.parametrize("case", SERIES)
def test_bad_series(tmp_path: Path, case: str) -> None:
    ending, text, sentence = SERIES[case]
    refused(lambda: load(written(tmp_path / f"set.{ending}", text)), sentence)


def test_wide_tables_are_read_at_once(tmp_path: Path) -> None:
    with bounded():
        started = time.process_time()
        splits = load(written(tmp_path / "set.tsv", ("1" + "\t1" * 300_000 + "\n") + ("2" + "\t1" * 300_000 + "\n")))
        assert time.process_time() - started < 2
    assert splits.train.spec.shape == (1, 300_000)


def test_series_files_are_not_read_through_links_or_without_end(tmp_path: Path) -> None:
    secret = written(tmp_path / "secret.ts", "secret:words")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "X_TRAIN.ts").symlink_to(secret)
    assert "words" not in refused(lambda: load(tmp_path / "set"), "link out of the data set")
    written(tmp_path / "other" / "X_TRAIN.ts", TS + "1,2:a\n1,3:b\n")
    (tmp_path / "other" / "X_TEST.ts").symlink_to(secret)
    refused(lambda: load(tmp_path / "other"), "link out of the data set")
    refused(lambda: load(tmp_path / "other" / "X_TRAIN.ts"), "link out of the data set")
    refused(lambda: load(sparse(tmp_path / "big.ts", 2**40)), "at most 4,294,967,296 are read")


def test_a_file_name_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas opens what looks like an address."""
    written(tmp_path / "http:" / "set.tsv", "1\t1\t2\n2\t3\t4\n")
    monkeypatch.chdir(tmp_path)
    assert len(load(Path("http:/set.tsv")).train) == 2
