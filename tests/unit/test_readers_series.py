import sys

import pytest
import torch

from antibackdoor.data.core import check_trainable
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from antibackdoor.limits import MAX_HEADER

HEAD = "@problemName x\n@timeStamps false\n@univariate true\n@equalLength {}\n@classLabel true a b\n@data\n"


def ts(path, *lines, equal="false", head=HEAD):
    path.write_text(head.format(equal) + "\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def _aeon():
    pytest.importorskip("aeon")


def test_unequal_lengths_pad_to_the_longest_of_both_sets(tmp_path):
    train = ts(tmp_path / "S_TRAIN.ts", "1,2,3:b", "4,-5:a")
    ts(tmp_path / "S_TEST.ts", "1,2,3,4:b", "5:b")
    for source in (train, tmp_path):
        splits = load(source)
        assert splits.test is not None and splits.train.spec.shape == (1, 4)
        assert splits.train.x[:, 0].tolist() == [[1, 2, 3, 0], [4, -5, 0, 0]]
        assert splits.train.lengths.tolist() == [3, 2] and splits.test.lengths.tolist() == [4, 1]
        assert splits.train.y.tolist() == [1, 0] and splits.test.y.tolist() == [1, 1]
        assert (splits.train.spec.low, splits.train.spec.high) == (-5, 4) and splits.train.ids == ["0", "1"]


def test_the_same_set_in_all_formats(tmp_path):
    one = load(ts(tmp_path / "a.ts", "1,2,3:1", "4,5,6:2", equal="true")).train
    (tmp_path / "a.tsv").write_text("1\t1.0\t2.0\t3.0\n2\t4.0\t5.0\t6.0\n")
    (tmp_path / "a.arff").write_text("@relation a\n@attribute t numeric\n@data\n1,2,3,1\n4,5,6,2\n")
    assert load(tmp_path / "a.tsv").train.fingerprint() == one.fingerprint()
    assert load(tmp_path / "a.arff").train.fingerprint() == one.fingerprint()
    assert one.lengths is None and one.x.dtype == torch.float32


def test_missing_values(tmp_path):
    path = ts(tmp_path / "a.ts", "1,2,3,4:a", "?,2,?,4:b", equal="true")
    with pytest.raises(InputError, match=r"sample '1' holds missing values.*--missing"):
        load(path)
    assert load(path, missing="interpolate").train.x[1, 0].tolist() == [2, 2, 3, 4]
    assert load(path, missing="zero").train.x[1, 0].tolist() == [0, 2, 0, 4]
    with pytest.raises(InputError, match="missing values 'zer'"):
        load(path, missing="zer")


@pytest.mark.parametrize(
    ("train", "test", "gist"),
    [
        (["1,2:a", "3,4:b"], ["1,2,3:a"], "have length 2 but all test series 3"),
        (["1,2:a", "3,4:b"], ["1,2:c"], "'c', which the training set does not have"),
        (["1,2:a", "3,inf:b"], None, "sample '1' holds infinite"),
        (["1,2:a", "3,1e300:b"], None, "too large for float32"),
        (["1,2:a", "?,?:b"], None, "no values at all"),
        (["1,2:a", "3,x:b"], None, "cannot read .*S_TRAIN.ts as a .ts file"),
        (["1,2:a", "3,4:5,6:b"], None, "cannot read .*Inconsistent"),
        ([], None, "holds no series"),
    ],
)
def test_bad_files(tmp_path, train, test, gist):
    path = ts(tmp_path / "S_TRAIN.ts", *train) if train else tmp_path / "S_TRAIN.ts"
    if not train:
        path.write_text(HEAD.format("true"))
    if test:
        ts(tmp_path / "S_TEST.ts", *test)
    with pytest.raises(InputError, match=gist):
        load(path)


def test_headers_that_cannot_be_trusted(tmp_path):
    stamped = HEAD.replace("@timeStamps false", "@timeStamps true")
    with pytest.raises(InputError, match="time stamps"):
        load(ts(tmp_path / "a.ts", "(0.5,-1.0),(1.5,2.0):a", head=stamped))
    target = HEAD.replace("@classLabel true a b", "@targetlabel true")
    with pytest.raises(InputError, match="no class labels"):
        load(ts(tmp_path / "b.ts", "1,2:0.5", head=target))


def test_an_arff_has_a_line_for_each_step_however_many(tmp_path):
    steps = MAX_HEADER + 1
    names = "".join(f"@attribute t{step} numeric\n" for step in range(steps))
    rows = "".join("1," * steps + f"{name}\n" for name in "xyxy")
    (tmp_path / "long.arff").write_text("@relation long\n" + names + "@attribute c {x,y}\n@data\n" + rows)
    assert load(tmp_path / "long.arff").train.spec.shape == (1, steps)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 garbage \xff\xfe", b"1\tx\ty\n"])
@pytest.mark.parametrize("ending", [".ts", ".tsv", ".arff"])
def test_garbage_is_one_sentence(tmp_path, ending, content):
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(InputError, match=f"a{ending}"):
        load(tmp_path / f"a{ending}")


def test_series_of_length_one(tmp_path):
    with pytest.raises(InputError, match="length 1"):
        check_trainable(load(ts(tmp_path / "a.ts", "1:a", "2:b")).train)


def test_without_aeon(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon.datasets", None)
    with pytest.raises(InputError, match=r"antibackdoor\[series\]"):
        load(ts(tmp_path / "a.ts", "1,2:a"))


def test_folder_without_a_training_file(tmp_path):
    ts(tmp_path / "S_TEST.ts", "1,2:a")
    with pytest.raises(InputError, match="no file NAME_TRAIN"):
        load(tmp_path)
