"""Tables of series: one CSV file whose rows are series, or time steps of them."""

import pytest
import torch
from typer.testing import CliRunner

from antibackdoor import limits
from antibackdoor.cli import app
from antibackdoor.data import tables
from antibackdoor.data.core import Spec
from antibackdoor.data.load import load, load_samples
from antibackdoor.errors import InputError, LeftOut

WIDE = "label,t0,t1,t2\nwalk,1,2,3\nrun,-1,0.5,\nwalk,4,5,6\n"
LONG = "id,x,label,y\na,1,walk,10\na,2,walk,20\nb,4,run,40\na,3,walk,30\nb,5,run,50\n"


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def table(tmp_path):
    return tmp_path / "table.csv"


def test_a_row_is_a_series(table):
    train = load(write(table, WIDE)).train
    assert train.spec.kind == "series" and train.spec.shape == (1, 3) and train.spec.classes == ("run", "walk")
    assert list(train.ids) == ["0", "1", "2"] and train.y.tolist() == [1, 0, 1]
    assert train.x[:2].tolist() == [[[1, 2, 3]], [[-1, 0.5, 0]]] and train.lengths.tolist() == [3, 2, 3]


def test_rows_of_one_id_are_the_steps_of_a_series_wherever_they_stand(table):
    train = load(write(table, LONG)).train
    assert train.spec.shape == (2, 3) and list(train.ids) == ["a", "b"] and train.y.tolist() == [1, 0]
    assert train.x[0].tolist() == [[1, 2, 3], [10, 20, 30]] and train.x[1].tolist() == [[4, 5, 0], [40, 50, 0]]
    assert train.lengths.tolist() == [3, 2]


@pytest.mark.parametrize(
    "text",
    [
        WIDE,
        WIDE.replace("label", " Label ").replace(",", ";").replace("0.5", "0,5"),
        WIDE.replace(",", "\t"),
        "t0,t1,t2,label\n1,2,3,walk\n-1,.5,NA,run\n\n4,5,6,walk\n",
        "\ufefflabel,t0,t1,t2\r\nwalk,1,2,3\r\nrun,-1,0.5,nan\r\nwalk,4,5,6\r\n",
        ",label,t0,t1,t2\n0,walk,1,2,3\n1,run,-1,0.5,\n2,walk,4,5,6\n",
        "Unnamed: 0,label,t0,t1,t2\n7,walk,1,2,3\n8,run,-1,0.5,\n9,walk,4,5,6\n",
        "label,id,t0,t1,t2\nwalk,0,1,2,3\nrun,1,-1,0.5,\nwalk,2,4,5,6\n",
    ],
)
@pytest.mark.filterwarnings("ignore:.*called Unnamed")
def test_the_same_table_in_other_hands(table, tmp_path, text):
    assert load(write(table, text)).train.fingerprint() == load(write(tmp_path / "w.csv", WIDE)).train.fingerprint()


def test_columns_that_say_when_are_left_out_and_told(table):
    text = LONG.replace("id,", "id,Time,").replace("\na,", "\na,noon,").replace("\nb,", "\nb,night,")
    with pytest.warns(LeftOut, match="columns called Time are not read"):
        splits = load(write(table, text))
    assert splits.train.spec.shape == (2, 3) and "Time" in splits.notes[0]


def test_numbers_as_labels_are_classes_by_their_value(table):
    splits = load(write(table, "label,split,a,b\n1.0,,1,2\n2.0,,3,4\n1,test,5,6\n"))
    assert splits.train.spec.classes == ("1", "2") and splits.test.y.tolist() == [0]


@pytest.mark.parametrize(("encoding", "text"), [("utf-16", WIDE), ("cp1252", WIDE.replace("walk", "f\u00fcr"))])
def test_other_encodings_are_named(table, encoding, text):
    table.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="it is not UTF-8 text; save it as UTF-8"):
        load(table)


def test_splits_and_test_files(table, tmp_path):
    both = load(write(table, "split,label,a,b\ntrain,x,1,2\ntest,y,3,4\n,y,5,6\nval,x,7,8\n"))
    assert list(both.train.ids) == ["0", "2"] and list(both.test.ids) == ["1", "3"]
    assert both.test.y.tolist() == [1, 0] and both.train.y.tolist() == [0, 1]
    held = write(tmp_path / "held.csv", "label,u,v\nx,9,9\n")
    plain = write(tmp_path / "plain.csv", "label,a,b\nx,1,2\ny,3,4\n")
    assert load(plain, test=held).test.x.tolist() == [[[9, 9]]]
    assert load(plain, test=table).test.x.tolist() == [[[3, 4]], [[7, 8]]], "its test series"
    long = write(tmp_path / "long.csv", "id,label,a,b\np,x,1,2\np,x,3,4\n")
    assert load(long, test=long).test.x.tolist() == [[[1, 3], [2, 4]]]
    with pytest.raises(InputError, match=r"held\.csv has other columns than"):
        load(long, test=held)
    with pytest.raises(InputError, match=r"plain\.csv has other columns than"):
        load(write(tmp_path / "turned.csv", "label,b,a\nx,1,2\ny,3,4\n"), test=plain)
    twice = write(tmp_path / "twice.csv", "id,label,a,b\np,x,1,2\nq,y,3,4\nq,y,3,4\n")
    with pytest.raises(InputError, match=r"twice\.csv: the id 'q' stands in 2 rows"):
        load(plain, test=twice)


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("t0,t1\n1,2\n", "its first line needs the column label, beside path"),
        ("", "its first line needs the column label"),
        ("label,label,t\na,b,1\n", "has the column label twice"),
        ("label,id\na,1\n", "has 0 columns of values"),
        ("label,t0,t1\na,1\n", "line 2: it has 2 cells, the first line 3"),
        ("label,t0,t1\na,1,2\n,3,4\n", "line 3: it has no label"),
        ("label,id,t0\na,,2\n", "line 2: it has no id"),
        ("label,t0,t1\na,1,high\n", "line 2: 'high' is no number"),
        ("label,split,t0\na,later,1\n", "line 2: it has the split 'later'"),
        ("id,label,t0\nq,a,1\nq,b,2\n", "line 3: the series 'q' has another label or split here"),
        ("label,split,t0\na,test,1\n", "holds no training series"),
        ("label,t0\n", "holds no training series"),
        ("label,t0,t1\na,1,2\nb,inf,2\n", "sample '1' holds infinite values"),
        ("label,t0,t1\na,1,2\nb,1e300,2\n", "sample '1' holds infinite values"),
        ("label,t0,t1,t2\na,1,,2\n", r"sample '0' holds missing values .*--missing"),
        ('label,t0\n"a,1\n', "cannot read"),
        ("id,label,t0,t1\np,a,1,2\nq,b,3,4\nr,a,5,6\nq,b,3,4\n", "the id 'q' stands in 2 rows, most others in one"),
        ('id,label,t0,t1\n"p\nq",a,1,2\nr,b,high,2\n', "line 4: 'high' is no number"),
        ("label,t0,t1\nnan,1,2\nb,3,4\n", "holds a series without a label"),
    ],
)
def test_bad_tables(table, text, gist):
    with pytest.raises(InputError, match=gist) as caught:
        load(write(table, text))
    assert str(table) in str(caught.value) and "\n" not in str(caught.value)


def test_limits(table, monkeypatch):
    monkeypatch.setattr(tables, "MAX_CHANNELS", 1)
    with pytest.raises(InputError, match="has 2 channels, more than 1"):
        load(write(table, LONG))
    monkeypatch.setattr(tables, "MAX_STEPS", 2)
    with pytest.raises(InputError, match="has 3 columns of values; 1 to 2"):
        load(write(table, WIDE))
    monkeypatch.setattr(limits, "memory", lambda: 40)
    with pytest.raises(InputError, match=r"table.csv would take .* GiB of memory"):
        load(write(table, "label,a,b\nx,1,2\n"))


def test_options_of_images_are_refused(table):
    with pytest.raises(InputError, match="image_size is for images"):
        load(write(table, WIDE), image_size=8)
    with pytest.raises(InputError, match=r"memory-mapped from an \.npz"):
        load(table, memory_map=True)


def test_samples_for_a_model_with_and_without_labels(table):
    spec = Spec("series", (1, 3), ("run", "walk"))
    data, names = load_samples(write(table, WIDE), spec)
    assert names == ["walk", "run", "walk"] and data.lengths.tolist() == [3, 2, 3]
    data, names = load_samples(write(table, "id,t0,t1,t2\nfirst,1,2,3\nsecond,4,5,6\n"), spec)
    assert names is None and list(data.ids) == ["first", "second"] and data.x.tolist() == [[[1, 2, 3]], [[4, 5, 6]]]
    data, names = load_samples(write(table, "label,split,t0,t1,t2\n,test,1,2,3\n,test,4,5,6\n"), spec)
    assert names is None and len(data) == 2
    data, names = load_samples(write(table, "t0\n1\n2\n3\n"), spec)
    assert names is None and torch.equal(data.x, torch.tensor([[[1.0, 2, 3]]])), "one recording"


def test_poison_writes_what_can_be_read_again(table, tmp_path):
    rows = [f"{'ab'[k % 2]}," + ",".join(str((k * j) % 7) for j in range(12)) for k in range(40)]
    write(table, "\n".join(["label," + ",".join(f"t{j}" for j in range(12)), *rows]) + "\n")
    told = ["poison", table, "--test", table, "--attack", "badnets", "--format", "folder", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, list(map(str, told)))
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "out").train.spec.shape == (1, 12)
