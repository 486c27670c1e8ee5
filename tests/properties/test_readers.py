import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from antibackdoor.data.arrays import load_npz, write_npz
from antibackdoor.data.core import Data, Spec, Splits
from antibackdoor.data.series import clean, from_cases

finite = st.floats(-1e6, 1e6, width=32)
few = settings(max_examples=20, deadline=None)
# Any text but NUL, which numpy's text arrays strip from the end.
names = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), min_size=1, max_size=5)


@st.composite
def data_sets(draw):
    n, count = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    classes = tuple(draw(st.lists(names, min_size=count, max_size=count, unique=True)))
    y = torch.tensor(draw(st.lists(st.integers(0, count - 1), min_size=n, max_size=n)))
    ids = draw(st.lists(names, min_size=n, max_size=n, unique=True))
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, 3])), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        x = draw(arrays(np.uint8, (n, *shape)))
        return Data(torch.from_numpy(x), y, Spec("image", shape, classes), ids)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)))
    x = draw(arrays(np.float32, (n, *shape), elements=finite))
    lengths = None
    if draw(st.booleans()):
        lengths = torch.tensor(draw(st.lists(st.integers(1, shape[1]), min_size=n, max_size=n)))
        x[np.broadcast_to((np.arange(shape[1]) >= lengths.numpy()[:, None])[:, None], x.shape)] = 0
    return Data(torch.from_numpy(x), y, Spec("series", shape, classes, -1e6, 2e6), ids, lengths)


@few
@given(data_sets(), st.booleans())
def test_npz_round_trip(data, memory_map):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        write_npz(path, Splits(data, data.take(torch.tensor([0]))))
        again = load_npz(path, memory_map=memory_map)
    assert again.train.fingerprint() == data.fingerprint()
    assert again.test is not None and again.test.fingerprint() == data.take(torch.tensor([0])).fingerprint()


@few
@given(st.data())
def test_padding_and_lengths_round_trip(data):
    channels = data.draw(st.integers(1, 3))
    cases = [
        data.draw(arrays(np.float32, (channels, data.draw(st.integers(1, 6))), elements=finite))
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    train = from_cases(cases, ["a"] * len(cases), where="here").train
    lengths = [case.shape[1] for case in cases] if train.lengths is None else train.lengths.tolist()
    assert lengths == [case.shape[1] for case in cases]
    for case, row, length in zip(cases, train.x, lengths, strict=True):
        assert np.array_equal(row[:, :length].numpy(), case) and not row[:, length:].any()


@few
@given(arrays(np.float32, (3, 2, 6), elements=finite | st.just(np.nan)), st.sampled_from(["zero", "interpolate"]))
def test_cleaned_series_stay_within_what_was_given(x, missing):
    x[:, :, 0] = np.nan_to_num(x[:, :, 0])  # at least one value in every channel
    out, lengths = clean(x, None, ["0", "1", "2"], missing, "here")
    assert np.isfinite(out).all() and (lengths >= 1).all()
    assert np.nanmin([np.nanmin(x), 0]) <= out.min() and out.max() <= np.nanmax([np.nanmax(x), 0])
    kept = ~np.isnan(x)
    assert np.array_equal(out[kept], x[kept])
