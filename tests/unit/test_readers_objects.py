import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import antibackdoor
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from toy import toy_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (6, 10, 8, 3), dtype=np.uint8)
PLANES = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())


class Items(Dataset):
    """Items as given, with the names of classes where there are any."""

    def __init__(self, items, classes=None):
        self.items = items
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((2, 5), float(k)), k % 2) for k in range(4)])


class Random(Items):
    def __getitem__(self, row):
        return torch.rand(3, 8, 8), row % 2


@pytest.mark.parametrize(
    "sample",
    [
        lambda k: Image.fromarray(PIXELS[k]),
        lambda k: PIXELS[k],
        lambda k: PLANES[k],
        lambda k: PLANES[k].float() / 255,
    ],
)
def test_images_of_every_form(sample):
    splits = load(Items([(sample(k), k % 3) for k in range(6)], ["z", "b", "c"]), test=Items([(sample(0), 2)]))
    assert splits.train.spec.classes == ("z", "b", "c") and torch.equal(splits.train.x[torch.arange(6)], PLANES)
    assert splits.train.ids == ["0", "1", "2", "3", "4", "5"] and splits.source is None


def test_sizes_and_gray():
    mixed = Items([(Image.new("L", (9 + k, 7)), k % 2) for k in range(3)])
    with pytest.raises(InputError, match="different shapes"):
        load(mixed)
    with pytest.raises(InputError, match="is not a number of pixels"):
        load(mixed, image_size=(6, 0))
    assert load(mixed, image_size=6).train.spec.shape == (3, 6, 6)
    assert load(Items([(PIXELS[k, :, :, 0], k % 2) for k in range(4)])).train.spec.shape == (1, 10, 8)


def test_series():
    made = load(TensorDataset(torch.randn(6, 2, 9), torch.arange(6) % 2)).train
    assert made.spec.shape == (2, 9) and made.spec.kind == "series"
    assert load(Stream()).train.x[torch.tensor([3])].unique().tolist() == [3.0]
    unequal = load(Items([({"x": np.ones(3 + k), "y": "ab"[k % 2]}) for k in range(4)])).train
    assert unequal.lengths.tolist() == [3, 4, 5, 6] and unequal.spec.classes == ("a", "b")


@pytest.mark.parametrize(
    ("items", "gist"),
    [
        ([], "no samples"),
        ([PIXELS[0]], "sample 0 of the training set is no pair"),
        ([(PIXELS[0], 1.5)], "label of sample 0"),
        ([(PIXELS[0], None)], "label of sample 0"),
        ([(PIXELS[0], [1])], "label of sample 0"),
        ([(PLANES[0].float(), 0)], "without normalization"),
        ([(torch.full((3, 4, 4), torch.nan), 0)], "without normalization"),
        ([("text", 0)], "neither an image"),
        ([(torch.zeros(2, 2, 2, 2), 0)], "neither an image"),
        ([(PIXELS[0], 0), (np.zeros(4), 1)], "images and series"),
        ([(np.array([1.0, np.inf]), 0)], "infinite"),
        ([(np.ones((2, 3)), 0), (np.ones((3, 3)), 1)], "channels"),
        ([(PIXELS[0], 0), (PIXELS[1], -1)], "class '-1'|sample"),
    ],
)
def test_bad_items(items, gist):
    if gist.startswith("class '-1'"):
        assert load(Items(items)).train.spec.classes == ("-1", "0")  # a name like any other
        return
    with pytest.raises(InputError, match=gist):
        load(Items(items))


def test_what_changes_has_no_samples():
    with pytest.raises(InputError, match="without random augmentation"):
        load(Random([None] * 6))
    with pytest.raises(InputError, match="must be a Dataset too"):
        load(Stream(), test="somewhere")
    with pytest.raises(InputError, match="with a Dataset as training set"):
        load("somewhere", test=Stream())


def test_train_takes_it():
    data = toy_images(40)
    items = Items([(data.x[k], int(data.y[k])) for k in range(40)])
    result = antibackdoor.train(
        items, defense="none", options={"recipe.min_steps": 0}, model="resnet18-w8", epochs=1, device="cpu"
    )
    assert len(result.suspects) == 40
