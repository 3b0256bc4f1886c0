"""The linear probe: against first-order conditions, a closed form and scikit-learn; features against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sidestream.data import ClipOptions, synthetic_dataset
from sidestream.errors import InputError, ModelError
from sidestream.evals.probe import extract_features, linear_probe
from sidestream.types import InputSpec

SPEC = InputSpec(size_px=(16, 16), layout="BTCHW", num_frames=4)


def blobs(seed: int = 0, num: int = 120, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    labels_N = torch.arange(num) % num_classes
    torch.manual_seed(99)
    centres = torch.randn(num_classes, 6)
    torch.manual_seed(seed + 1)
    return centres[labels_N] * 1.5 + torch.randn(num, 6) + 5.0, labels_N


@pytest.mark.parametrize("c", [0.05, 1.0, 20.0])
def test_the_gradient_of_the_objective_is_zero_at_the_answer(c: float) -> None:
    train, labels = blobs()
    found = linear_probe(train, labels, *blobs(7), c=c)
    x = train.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    scores = x @ found.weight_ND.numpy().T + found.bias_N.numpy()
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    off = (shares - np.eye(4)[labels.numpy()]) / len(x)
    assert np.abs(off.T @ x + found.weight_ND.numpy() / (c * len(x))).max() < 1e-6
    assert np.abs(off.sum(0)).max() < 1e-6


def test_two_points_have_a_closed_form() -> None:
    """At x = -1 and 1: weights -w and w with w = c * sigmoid(-2 w), no bias (the mean loss's slope by hand)."""
    points, labels = torch.tensor([[-3.0], [5.0]]), torch.tensor([0, 1])
    found = linear_probe(points, labels, points, labels, c=2.0)
    low, high = 0.0, 10.0
    for _ in range(100):
        w = (low + high) / 2
        low, high = (w, high) if w < 2.0 * 2 / (1 + math.exp(2 * w)) else (low, w)
    assert found.weight_ND.flatten().tolist() == pytest.approx([-w, w], abs=1e-6)
    assert found.bias_N.abs().max() < 1e-6
    assert found.accuracy == found.train_accuracy == 1.0


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_it_is_scikit_learns_logistic_regression(c: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    (train, labels), (test, test_labels) = blobs(), blobs(7)
    found = linear_probe(train, labels, test, test_labels, c=c)
    scaler = preprocessing.StandardScaler().fit(train.double().numpy())
    theirs = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=2000)
    theirs.fit(scaler.transform(train.double().numpy()), labels.numpy())
    assert np.abs(found.weight_ND.numpy() - theirs.coef_).max() < 1e-4
    assert found.answers.tolist() == theirs.predict(scaler.transform(test.double().numpy())).tolist()


def test_accuracy_is_counted_and_the_answer_is_the_same_again() -> None:
    first, again = (linear_probe(*blobs(), *blobs(7)) for _ in range(2))
    _, labels = blobs(7)
    assert first.weight_ND.equal(again.weight_ND)
    assert first.accuracy == sum(a == b for a, b in zip(first.answers.tolist(), labels.tolist(), strict=True)) / 120
    assert first.accuracy > 0.6
    for label, share in first.per_class.items():
        own = labels == label
        assert share == pytest.approx(float((first.answers[own] == label).float().mean()))


def test_a_feature_that_never_changes_does_no_harm() -> None:
    train, labels = blobs()
    flat = torch.cat([train, torch.full((120, 1), 3.0)], dim=1)
    found, wanted = linear_probe(flat, labels, flat, labels), linear_probe(train, labels, train, labels)
    assert torch.allclose(found.weight_ND[:, :6], wanted.weight_ND, atol=1e-5)
    assert found.weight_ND[:, 6].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_train_ND": torch.zeros(3, 2, 2)}, r"train features of shape \(3, 2, 2\)"),
        ({"labels_test_N": torch.zeros(5, dtype=torch.long)}, r"labels of shape \(5,\)"),
        ({"features_test_ND": torch.zeros(120, 5)}, "train features have 6 columns, test features 5"),
        ({"features_test_ND": torch.full((120, 6), math.nan)}, "test features are NaN"),
        ({"c": 0.0}, "c = 0.0"),
        ({"num_classes": 2}, "num_classes = 2, but the labels go up to 3"),
    ],
)
def test_wrong_inputs(change: dict, message: str) -> None:
    names = ("features_train_ND", "labels_train_N", "features_test_ND", "labels_test_N")
    given = {**dict(zip(names, (*blobs(), *blobs(7)), strict=True)), **change}
    with pytest.raises(InputError, match=message):
        linear_probe(*[given.pop(name) for name in names], **given)


class Maps(nn.Module):
    """A clip model with features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm3d(5)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        return self.norm(self.conv(clip_BTCHW.transpose(1, 2))).transpose(1, 2)


def test_features_are_those_of_each_clip_alone_in_eval_mode() -> None:
    model = Maps()
    data = synthetic_dataset(spec=SPEC, num_clips=7, options=ClipOptions(random_flip=True))
    per_clip, labels, keys = extract_features(model, data, batch_size=3)
    per_frame, _, _ = extract_features(model, data, pool="frame", batch_size=4)
    assert model.training
    plain = synthetic_dataset(spec=SPEC, num_clips=7).with_part("test")
    model.eval()
    with torch.no_grad():
        wanted = torch.stack([model.features(plain[n].clip_TCHW[None])[0].mean((-2, -1)) for n in range(7)])
    assert torch.allclose(per_frame, wanted, atol=1e-5)
    assert torch.allclose(per_clip, wanted.mean(1), atol=1e-5)
    assert labels.tolist() == [record.label for record in data.records]
    assert keys == tuple(record.key for record in data.records)
    with pytest.raises(ModelError, match="Linear has no method features"):
        extract_features(nn.Linear(2, 2), data)
