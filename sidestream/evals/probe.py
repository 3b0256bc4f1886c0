"""Linear probe: multinomial logistic regression on frozen features; ``extract_features`` makes the features.

The probe standardises each feature with the training set's mean and deviation and minimises, with L-BFGS in float64,

    mean cross-entropy + ||W||^2 / (2 C N)          (the bias is not penalised; N clips)

which is the objective of scikit-learn's LogisticRegression(C). It is convex, so the answer does not depend on a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidestream.data import ClipDataset, Loader
from sidestream.errors import InputError, ModelError
from sidestream.models import info_of

MAX_ITERATIONS = 500
GRADIENT_TOLERANCE = 1e-7


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a linear classifier on the features gets right."""

    accuracy: float
    """Top-1 on the test features."""
    per_class: dict[int, float]
    """Label -> share of its test clips that are right; only labels that the test set has."""
    train_accuracy: float
    weight_ND: Tensor
    """float64, on standardised features."""
    bias_N: Tensor
    answers: Tensor
    """The class given to each test clip."""


def linear_probe(
    features_train_ND: Tensor,
    labels_train_N: Tensor,
    features_test_ND: Tensor,
    labels_test_N: Tensor,
    *,
    c: float = 1.0,
    num_classes: int | None = None,
) -> ProbeResult:
    """Fit on the training features, score on the test features. Deterministic.

    Args:
        c: inverse strength of the L2 penalty, above 0.
        num_classes: default: largest label + 1.

    Raises:
        InputError: shapes or labels that do not fit together, or features that are not finite.
    """
    _check(features_train_ND, labels_train_N, features_test_ND, labels_test_N)
    if not c > 0:
        raise InputError(f"{c = }; give a number above 0")
    count = int(torch.cat([labels_train_N, labels_test_N]).max()) + 1
    if num_classes is not None and num_classes < count:
        raise InputError(f"{num_classes = }, but the labels go up to {count - 1}")
    train_ND = features_train_ND.double()
    mean_D, std_D = train_ND.mean(0), train_ND.std(0, unbiased=False)
    std_D = torch.where(std_D > 0, std_D, torch.ones_like(std_D))
    ready = [(x.double() - mean_D) / std_D for x in (features_train_ND, features_test_ND)]
    weight_ND, bias_N = _fit(ready[0], labels_train_N, num_classes or count, c)
    answers = [(x @ weight_ND.T + bias_N).argmax(1) for x in ready]
    is_right = answers[1] == labels_test_N
    per_class = {
        int(label): float(is_right[labels_test_N == label].double().mean()) for label in labels_test_N.unique()
    }
    return ProbeResult(
        accuracy=float(is_right.double().mean()),
        per_class=per_class,
        train_accuracy=float((answers[0] == labels_train_N).double().mean()),
        weight_ND=weight_ND,
        bias_N=bias_N,
        answers=answers[1],
    )


def extract_features(
    model: nn.Module,
    dataset: ClipDataset,
    *,
    pool: Literal["clip", "frame"] = "clip",
    batch_size: int = 16,
    num_workers: int = 2,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Features of every clip that can be read: (features, labels (N,), keys), on the CPU.

    ``model.features(clip_BTCHW)`` (or ``(frame_BCHW)`` for a frame model) with axes (B, T, D, ...) is averaged over
    space, and over time too for ``pool="clip"``: (N, D). With ``pool="frame"``: (N, T, D). Clips are taken in the
    order of the data set, without augmentation (as the test part is), in eval mode, without a gradient.

    Raises:
        ModelError: the model has no method ``features``, or it does not answer (B, T, D, ...).
        InputError: not one clip can be read.
    """
    if not callable(getattr(model, "features", None)):
        raise ModelError(f"{type(model).__name__} has no method features; probe a model that has one")
    info = info_of(model)
    reads_frames = info is not None and info.input_spec.layout == "BCHW"
    was_training = model.training
    model.eval().to(device)
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    source = dataset if dataset.part == "test" else dataset.with_part("test")
    for batch in Loader(source, batch_size=batch_size, num_workers=num_workers, shuffle=False).batches(0):
        with torch.no_grad():
            rows.append(_features(model, batch.clip_BTCHW.to(device), reads_frames).cpu())
        labels.append(batch.labels_B)
        keys += batch.keys
    model.train(was_training)
    features_NTD = torch.cat(rows)
    return features_NTD.mean(1) if pool == "clip" else features_NTD, torch.cat(labels), tuple(keys)


def _features(model: nn.Module, clip_BTCHW: Tensor, reads_frames: bool) -> Tensor:
    """(B, T, D), averaged over space."""
    if reads_frames:
        maps = model.features(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2])  # type: ignore[operator]
    else:
        maps = model.features(clip_BTCHW)  # type: ignore[operator]
    if not isinstance(maps, Tensor) or maps.ndim < 3:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ModelError(f"{type(model).__name__}.features answers {given}; expected a tensor with axes (B, T, D, ...)")
    return maps.float().flatten(3).mean(-1) if maps.ndim > 3 else maps.float()


def _fit(train_ND: Tensor, labels_N: Tensor, num_classes: int, c: float) -> tuple[Tensor, Tensor]:
    weight_ND = torch.zeros(num_classes, train_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias_N = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight_ND, bias_N],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(train_ND @ weight_ND.T + bias_N, labels_N)
        loss = loss + weight_ND.square().sum() / (2 * c * len(train_ND))
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weight_ND.detach(), bias_N.detach()


def _check(train_ND: Tensor, labels_train_N: Tensor, test_ND: Tensor, labels_test_N: Tensor) -> None:
    for name, features, labels in (("train", train_ND, labels_train_N), ("test", test_ND, labels_test_N)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise InputError(
                f"{name} features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)}; "
                "expected (N, D) and (N,) with N of 1 or more"
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise InputError(f"{name} labels are {labels.dtype} from {labels.min()} on; give whole numbers from 0")
        if not features.isfinite().all():
            raise InputError(f"{name} features are NaN or infinite in places; look at the model's weights")
    if train_ND.shape[1] != test_ND.shape[1]:
        raise InputError(f"train features have {train_ND.shape[1]} columns, test features {test_ND.shape[1]}")
