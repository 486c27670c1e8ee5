"""Detectors on features and logits that can be worked out by hand, and on those that nothing can be worked out from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from antibackdoor.data.core import Data, Spec
from antibackdoor.defenses import Outcome
from antibackdoor.detectors import DETECTORS, make_detector
from antibackdoor.errors import InputError
from antibackdoor.models import create
from antibackdoor.training.features import projections
from antibackdoor.training.groups import halves
from antibackdoor.training.job import Job
from antibackdoor.training.scores import features_of
from tiny import FABRIC, same_weights, stored
from toy import toy_images, toy_series

OF_A_NETWORK = [entry.name for entry in DETECTORS if not entry.make.watches_training]
OF_CLASSES = ["activation_clustering", "spectral_signatures"]


class Reader(nn.Module):
    """Features are the samples themselves; the linear layer is the classifier."""

    def __init__(self, dims: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(dims, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


def as_data(values: Tensor, y: list[int], classes: int | None = None) -> Data:
    """`(n, D)` numbers as series of one channel."""
    names = tuple("abcdefghij"[: classes or max(y) + 1])
    spec = Spec("series", (1, values.shape[1]), names, -1e9, 1e9)
    return Data(values[:, None].float(), torch.tensor(y), spec, [f"id {k}" for k in range(len(y))])


def run(name: str, values: Tensor, y: list[int], classes: int | None = None, **settings: object) -> Outcome:
    data = as_data(values, y, classes)
    net = Reader(values.shape[1], len(data.spec.classes))
    return make_detector(name, settings).run(Job(data, fabric=FABRIC), net)


def normal(n: int, dims: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def poisoned_class(n: int = 60, group: int = 12, distance: float = 12.0) -> tuple[Tensor, list[int], Tensor]:
    """Two classes of n samples; the last `group` of class 1 lie far away in one direction."""
    values, y = normal(2 * n), [0] * n + [1] * n
    truth = torch.arange(2 * n) >= 2 * n - group
    values[truth, 3] += distance
    return values, y, truth


class Logits(nn.Module):
    """Answers the samples themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_loss_and_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [800.0, 0.0, 0.0]])
    job = Job(as_data(logits, [0, 1, 1], 3), fabric=FABRIC)
    loss = make_detector("loss").run(job, Logits()).scores
    assert loss[0].item() == pytest.approx(-math.log(3)) and loss[1].item() == pytest.approx(-math.log(4))
    assert loss[2].item() == pytest.approx(-800)
    entropy = make_detector("entropy").run(job, Logits()).scores
    by_hand = 0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)
    assert entropy.tolist() == pytest.approx([-math.log(3), by_hand, 0.0])
    assert loss.dtype == entropy.dtype == torch.float64


def test_sure_predictions_still_differ() -> None:
    """In float32 the probabilities 1 - 1e-9 and 1 - 1e-12 are both 1."""
    job = Job(as_data(torch.tensor([[20.7, 0.0], [27.6, 0.0]]), [0, 0], 2), fabric=FABRIC)
    for name in ("loss", "entropy"):
        first, second = make_detector(name).run(job, Logits()).scores.tolist()
        assert first < second < 0


def test_a_named_share_is_flagged_and_nothing_else() -> None:
    logits = torch.tensor([[float(k), 0.0] for k in range(20)])
    for name in ("loss", "entropy"):
        detector = make_detector(name)
        data = as_data(logits, [0] * 20, 2)
        outcome = detector.run(Job(data, fabric=FABRIC), Logits())
        assert not outcome.flagged.any() and not detector.decides and detector.verdict(data, outcome).confidence == 0
        flagged = make_detector(name, {"flag": 0.1}).run(Job(data, fabric=FABRIC), Logits()).flagged
        assert flagged.nonzero().flatten().tolist() == [18, 19]


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (300, 3), (5, 1), (1100, 1030)])
def test_projections_are_those_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    features = normal(shape[0], shape[1])
    features = features - features.mean(0)
    features[:, 0] *= 8 if len(features) < 1000 else 40
    state = torch.get_rng_state()
    found = projections(features)
    assert torch.equal(state, torch.get_rng_state())  # whoever calls keeps their random numbers
    v = torch.linalg.svd(features.double(), full_matrices=False).Vh[0]
    assert torch.allclose(found.abs(), (features.double() @ v).abs(), rtol=1e-6, atol=1e-8)


def test_halves_by_hand() -> None:
    group, apart = halves(torch.tensor([-1.0, -3.0, -2.0, 7.0, 9.0]).double())
    assert group.tolist() == [False, False, False, True, True]
    assert apart == pytest.approx(10 / math.sqrt((2 / 3 + 1) / 2))
    mirrored, same = halves(torch.tensor([1.0, 3.0, 2.0, -7.0, -9.0]).double())
    assert torch.equal(group, mirrored) and same == pytest.approx(apart)  # the sign of a direction has no meaning
    assert halves(torch.tensor([0.0, 0.0, 1.0]).double())[1] == 1e6
    assert halves(normal(20000, 1).double()[:, 0])[1] == pytest.approx(2.65, abs=0.05)
    assert halves(torch.linspace(-1, 1, 1001).double())[1] == pytest.approx(math.sqrt(12), abs=0.01)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_group_of_its_own_is_found(name: str) -> None:
    values, y, truth = poisoned_class()
    outcome = run(name, values, y)
    assert torch.equal(outcome.flagged, truth)
    assert outcome.scores[truth].min() > outcome.scores[~truth].max()
    assert set(outcome.reasons) == set(truth.nonzero().flatten().tolist())
    data = as_data(values, y)
    verdict = make_detector(name).verdict(data, outcome)
    assert verdict.poisoned and verdict.target_classes == ["b"] and verdict.estimated_rate == 0.1
    assert "12" in verdict.evidence[0] and "60" in verdict.evidence[0]


@pytest.mark.parametrize("name", OF_CLASSES)
def test_nothing_is_found_where_there_is_nothing(name: str) -> None:
    """No share is dropped from every class for its own sake."""
    for seed in range(5):
        values, y = normal(120, seed=seed).relu() if seed % 2 else normal(120, seed=seed), [0] * 60 + [1] * 60
        outcome = run(name, values, y)
        verdict = make_detector(name).verdict(as_data(values, y), outcome)
        assert not outcome.flagged.any() and not verdict.poisoned and verdict.evidence
        assert 0.5 <= verdict.confidence < 1


def test_spectral_signatures_by_hand() -> None:
    """Centered, the class lies on one axis: -2, -2, 0, 4."""
    values = torch.tensor([[1.0, 5.0], [1.0, 5.0], [3.0, 5.0], [7.0, 5.0]])
    assert run("spectral_signatures", values, [0] * 4, 2).scores.tolist() == pytest.approx([4, 4, 0, 16])


def test_a_given_rate_flags_one_and_a_half_of_it_in_every_class() -> None:
    values, y, truth = poisoned_class(60)
    outcome = run("spectral_signatures", values, y, rate=0.2)
    assert [int(outcome.flagged[:60].sum()), int(outcome.flagged[60:].sum())] == [
        18,
        18,
    ]  # not 1.5 * 0.2 of the set, and not half of every class
    assert (outcome.flagged[truth]).all()
    detector = make_detector("spectral_signatures", {"rate": 0.2})
    assert not detector.decides and not detector.verdict(as_data(values, y), outcome).poisoned


def test_activation_clustering_scores_by_hand() -> None:
    """Clusters {0, 2} and {19, 20, 20, 21} have their centers at 1 and 20."""
    values = torch.tensor([[0.0], [2.0], [19.0], [20.0], [20.0], [21.0]])
    outcome = run("activation_clustering", values, [0] * 6, 2)
    s = outcome.evidence["classes"][0]["separation"]
    assert 0.9 < s < 1 and not outcome.flagged.any()  # six samples prove nothing
    leaning = [19 / 20, 17 / 18, -17 / 18, -1, -1, -19 / 20]
    assert outcome.scores.tolist() == pytest.approx([s * t for t in leaning], rel=1e-6)


def test_half_of_a_class_is_not_flagged() -> None:
    values, y, _ = poisoned_class(60, group=30)
    outcome = run("activation_clustering", values, y)
    assert not outcome.flagged.any() and max(row["separation"] for row in outcome.evidence["classes"]) > 0.5
    assert run("activation_clustering", values, y, largest=0.5).flagged.sum() == 30


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_few_samples_are_scored_but_not_flagged(name: str) -> None:
    values, y, _ = poisoned_class(60, group=2, distance=60)
    outcome = run(name, values, y)
    assert not outcome.flagged.any() and set(outcome.scores.topk(2).indices.tolist()) == {118, 119}
    small, labels = values[60:][-16:], [0] * 16
    outcome = run(name, small, labels, 2)
    assert not outcome.flagged.any() and outcome.scores[-2:].min() > outcome.scores[:-2].max()
    assert make_detector(name).verdict(as_data(small, labels, 2), outcome).confidence == 0


def test_large_classes_are_clustered_as_a_whole() -> None:
    """Not in batches: the group is 3 % of the class, fewer than one in each small batch."""
    values, y, truth = poisoned_class(4500, group=135)
    assert torch.equal(run("activation_clustering", values, y).flagged, truth)


DEGENERATE: dict[str, Callable[[], tuple[Tensor, list[int]]]] = {
    "a class with one sample": lambda: (normal(9), [0] * 8 + [1]),
    "classes of two and three": lambda: (normal(5), [0, 0, 1, 1, 1]),
    "an absent class": lambda: (normal(20), [0, 2] * 10),
    "constant features": lambda: (torch.full((12, 4), 3.0), [0, 1] * 6),
    "zero features": lambda: (torch.zeros(12, 4), [0, 1] * 6),
    "two values": lambda: (torch.tensor([[0.0], [1.0]]).repeat(8, 1), [0, 0, 1, 1] * 4),
    "one far away": lambda: (torch.cat([torch.zeros(15, 3), torch.full((1, 3), 1e4)]), [0, 1] * 8),
    "huge features": lambda: (normal(20) * 1e6, [0, 1] * 10),
    "tiny features": lambda: (normal(20) * 1e-12, [0, 1] * 10),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", OF_A_NETWORK)
def test_degenerate_sets_have_finite_scores(name: str, case: str) -> None:
    values, y = DEGENERATE[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = run(name, values, y, 4)
    assert outcome.scores.shape == (len(y),) and outcome.scores.isfinite().all()
    assert make_detector(name).verdict(as_data(values, y, 4), outcome).evidence


@pytest.mark.parametrize("name", OF_A_NETWORK)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_network_that_diverged_is_told_in_a_sentence(name: str, bad: float) -> None:
    data = as_data(normal(12), [0, 1] * 6)
    net = Reader(12, 2)
    with torch.no_grad():
        net.fc.weight.fill_(bad)
    if name in OF_CLASSES:  # the features come before the last layer
        net = nn.Sequential(net, nn.Linear(2, 2))  # type: ignore[assignment]
    with pytest.raises(InputError, match="'id 0' values that are not finite"):
        make_detector(name).run(Job(data, fabric=FABRIC), net)


def planted(data: Data) -> Data:
    """Of each class three samples are set apart from the other seven, so that the clustering has one answer."""
    x = stored(data)
    x[:12] = 250 if data.spec.kind == "image" else x[:12] + 20 * (x[:12] != 0)
    return replace(data, x=x)


@pytest.mark.parametrize("name", OF_A_NETWORK)
@pytest.mark.parametrize(
    "data", [toy_images(40), toy_series(40, 4), toy_series(40, 4, unequal=True)], ids=["2d", "1d", "len"]
)
def test_scores_follow_the_samples_and_leave_the_network_alone(name: str, data: Data) -> None:
    torch.manual_seed(0)
    data = planted(data)
    net = create("resnet18-w8", data.spec).train()
    before, weights = data.fingerprint(), {key: value.clone() for key, value in net.state_dict().items()}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    scores = make_detector(name).run(Job(data, fabric=FABRIC), net).scores
    torch.seed()
    again = make_detector(name).run(Job(data, fabric=FABRIC, seed=1), net).scores
    shuffled = make_detector(name).run(Job(data.take(order), fabric=FABRIC), net).scores
    assert torch.equal(scores, again)  # no augmentation, no chance
    scale = float(scores.abs().max())
    assert torch.allclose(scores[order], shuffled, atol=1e-3 * scale)
    assert data.fingerprint() == before and net.training
    assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


class Gated(nn.Module):
    """The classifier runs twice, and a linear layer that is no classifier runs after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.gate = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        self.fc(torch.zeros_like(h))
        logits: Tensor = self.fc(input=h)
        self.gate(logits)
        return logits


def test_features_are_what_the_classifier_is_given() -> None:
    data, net = as_data(normal(7, 5), [0, 1, 2, 0, 1, 2, 0]), Gated()
    features = features_of(net, data, FABRIC)
    assert torch.allclose(features, net.body(data.x[torch.arange(7)].flatten(1)).detach())
    assert torch.allclose(features, features_of(net, data, FABRIC, size=3), atol=1e-6)
    rows = torch.tensor([4, 1])
    assert torch.allclose(features_of(net, data, FABRIC, rows), features[rows], atol=1e-6)
    images = toy_images(6)
    resnet = create("resnet18-w8", images.spec).eval()
    wanted = resnet.embed(images.spec.decode(images.x[torch.arange(6)]))  # type: ignore[operator]
    assert torch.allclose(features_of(resnet, images, FABRIC), wanted.detach(), atol=1e-5)


def test_features_at_several_positions_are_averaged() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.transpose(1, 2)).mean(1)
            return out

    values = normal(4, 6)
    assert torch.allclose(features_of(Tokens(), as_data(values, [0, 1, 0, 1]), FABRIC), values.mean(1, keepdim=True))


def test_a_network_without_a_linear_classifier_is_told_in_a_sentence() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv1d(1, 2, 1)
            self.squeeze = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.squeeze(x.flatten(1))
            out: Tensor = self.fc(x).mean(2)
            return out

    data, net = as_data(normal(4, 6), [0, 1, 0, 1]), Convolutional()
    with pytest.raises(InputError, match="does not end in a linear layer"):
        make_detector("spectral_signatures").run(Job(data, fabric=FABRIC), net)
    assert not any(m._forward_pre_hooks for m in net.modules())
    make_detector("loss").run(Job(data, fabric=FABRIC), net)


@pytest.mark.parametrize("name", ["jury", "loss_drop", "trap", "witnesses"])
def test_watching_needs_a_training(name: str) -> None:
    data = toy_images(24)
    net = create("resnet18-w8", data.spec)
    weights = create("resnet18-w8", data.spec)
    weights.load_state_dict(net.state_dict())
    with pytest.raises(InputError, match="training of its own"):
        make_detector(name).run(Job(data, fabric=FABRIC), net)
    assert same_weights(net, weights)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'spectral_signatures'"):
        make_detector("spectral_signature")
    with pytest.raises(InputError, match="did you mean 'silhouette'"):
        make_detector("activation_clustering", {"silhouete": 0.2})
    assert make_detector("auto") == make_detector("jury")
