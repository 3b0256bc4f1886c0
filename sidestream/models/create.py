"""Models by name: find the library, make the model, load its weights, remember what it wants to be fed."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Protocol, cast, get_args

from torch import nn

from sidestream.errors import InputError, ModelError, WeightsError
from sidestream.models.depth_net import DepthNet
from sidestream.models.guard import ANY_SIZE, guard_frames
from sidestream.models.heads import DenseModel, HeadKind
from sidestream.models.info import ModelInfo, Task, attach_info, info_of
from sidestream.models.labels import read_labels
from sidestream.models.source_names import may_have, source_names
from sidestream.models.weights import KeyMap, load_weights

FilePath = str | os.PathLike[str]


class Library(Protocol):
    """A module of this folder that knows models by their names inside one library."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> ModelInfo: ...

    def build(self, name: str, num_classes: int | None) -> nn.Module:
        """With fresh random weights."""
        ...

    def build_default(self, name: str) -> nn.Module:
        """With the weights that the library offers for it."""
        ...

    def key_map(self, name: str) -> KeyMap:
        """For weights files whose keys are not the model's own."""
        ...


# In the order in which a bare name is looked up. A new family is a new module, named here.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "sidestream": (
        "efficientnet_lite",
        "i3d",
        "conv3d_zoo",
        "slowfast_single",
        "slowfast",
        "x3d",
        "tsm",
        "recurrent",
        "timesformer",
        "transformers_zoo",
        "frame",
        "tsn",
        "vgg8",
        "autoencoder",
        "keypoint_cnn",
        "parallel_densenet",
        "parallel_inception",
    ),
    "torchvision": ("torchvision_zoo",),
    "timm": ("timm_zoo",),
}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: FilePath | None = None,
    labels: FilePath | Sequence[str] | None = None,
    head: HeadKind = "classes",
) -> nn.Module:
    """A model in eval mode, with its ``ModelInfo`` attached (``input_spec_of``, ``labels_of``).

    ``name`` is ``library/model`` or a bare name, looked up in Sidestream, torchvision, timm; or the folder of a saved
    model, or "hf:USER/NAME" on the hub, which come with weights and labels of their own. Frame models read
    ``frame_BCHW``, clip models ``clip_BTCHW``, both normalised as their input spec says.
    ``num_classes``: another number of classes than the library's (a fresh head).
    ``weights``: None or "random" for fresh ones, "default" for the library's own (from its hub, or a package), or the
    path of a ``.safetensors`` / ``.pt`` / ``.pth`` file; always strict.
    ``labels``: one per class, or the path of a file (``read_labels``); None for those that belong to the model.
    ``head``: "classes", or for a clip model "keypoints" (heat maps) or "masks", with ``num_classes`` maps each
    (``models.heads``); weights files are then those of the whole model, head included.

    Raises ``ModelError`` for an unknown name, ``WeightsError`` for weights that cannot be had or do not fit.
    """
    if num_classes is not None and not isinstance(num_classes, int):
        raise ModelError(f"{num_classes=} is no number of classes; give a whole number, or None for the model's own")
    if head not in get_args(HeadKind):
        raise ModelError(f"{head=} is unknown; there are {', '.join(get_args(HeadKind))}")
    if is_saved(name):
        from sidestream.models.pretrained import create_saved

        own = read_labels(labels) if isinstance(labels, str | os.PathLike) else labels
        return create_saved(name, num_classes=num_classes, weights=weights, labels=own, head=head)
    if weights == "random":
        weights = None
    library, inner = _resolve(name)
    if head != "classes" and library.info(inner).task != head:  # such a model has that head by itself
        return _with_dense_head(name, num_classes, weights, labels, head)
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"{num_classes=} was given for {name!r}; expected 1 or more, or None for the model's own")
    info = library.info(inner)
    names = labels if labels is None or not isinstance(labels, str | os.PathLike) else read_labels(labels)
    wanted = info.with_classes(num_classes, None if names is None else tuple(names))
    if weights == "default":
        model = _with_default_weights(library, inner, info, wanted.num_classes)
    else:
        model = library.build(inner, num_classes)
        if weights is not None:
            load_weights(model, weights, key_map=library.key_map(inner))
    if wanted.task in ("image", "segmentation"):
        sizes = getattr(library, "sizes", None)  # libraries whose models are not all of any size have it
        guard_frames(model, wanted.name, ANY_SIZE if sizes is None else sizes(model, wanted.input_spec))
    return attach_info(model.eval(), wanted)


def list_models(pattern: str = "*") -> list[str]:
    """Full names that match ``pattern`` (as in a shell: ``"*vit*"``, ``"timm/*"``), with or without the library."""
    found = []
    library, slash, _ = pattern.partition("/")
    for prefix in LIBRARIES:
        if slash and "[" not in library and not fnmatchcase(prefix, library):
            continue  # none of its names can match: it need not be imported
        for inner in _names(prefix):
            full = _full(prefix, inner)
            if fnmatchcase(full, pattern) or fnmatchcase(inner, pattern):
                found.append(full)
    return found


def model_info(name: str) -> ModelInfo:
    """What ``name`` stands for, without making the model. Raises ``ModelError`` for an unknown name."""
    library, inner = _resolve(name)
    return library.info(inner)


def check_model(name: str, weights: FilePath | None = None, labels: FilePath | None = None) -> None:
    """Raises, without making anything, what ``create_model`` would for an unknown name or for files that are missing.

    For commands: what the user mistyped comes out at once, not after the work.
    """
    if weights not in (None, "random", "default") and not os.path.exists(weights):
        raise WeightsError(f"there is no weights file {str(weights)!r}; give a .safetensors or .pt file, or random")
    if labels is not None and not os.path.isfile(labels):
        raise ModelError(f"there is no labels file {str(labels)!r}; give one label per line, or a JSON list")
    if is_saved(name):
        return
    library, inner = _resolve(name)
    if weights == "default" and library.info(inner).default_weights is None:
        raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map_of(name: str) -> KeyMap:
    """What becomes of the keys of foreign weights files for ``name``. Raises ``ModelError`` for an unknown name."""
    library, inner = _resolve(name)
    return library.key_map(inner)


def _with_dense_head(
    name: str,
    num_classes: int | None,
    weights: FilePath | None,
    labels: FilePath | Sequence[str] | None,
    head: HeadKind,
) -> nn.Module:
    if num_classes is None or num_classes < 1:
        raise ModelError(f"{num_classes=} was given with {head=}; say how many {head} the model answers, 1 or more")
    is_default = weights == "default"
    plain = create_model(name, weights="default" if is_default else None)
    trunk = info_of(plain)
    if isinstance(plain, DepthNet):
        model: nn.Module = plain.with_dense_head(num_classes, head)
    else:
        model = DenseModel(plain, num_classes, kind=head)
    if weights is not None and not is_default:
        load_weights(model, weights)
    assert trunk is not None  # create_model hangs one on every model
    task: Task = "masks" if head == "masks" else "keypoints"
    named = replace(trunk, task=task, labels=None, default_weights=None)
    given = read_labels(labels) if isinstance(labels, str | os.PathLike) else labels
    return attach_info(model.eval(), named.with_classes(num_classes, None if given is None else tuple(given)))


def _with_default_weights(library: Library, inner: str, info: ModelInfo, num_classes: int) -> nn.Module:
    if info.default_weights is None:
        raise WeightsError(f"{info.name} has no default weights; give a local .safetensors or .pt file")
    if num_classes != info.num_classes:
        raise WeightsError(
            f"the default weights of {info.name} answer {info.num_classes} classes, but {num_classes=} was given; "
            "leave num_classes out, or give a weights file that was trained with it"
        )
    try:
        return library.build_default(inner)
    except InputError:
        raise
    except Exception as error:  # each hub fails in its own ways: no network, no space, a moved file
        reason = next(iter(str(error).strip().splitlines()), "")[:160]
        raise WeightsError(
            f"cannot get the default weights of {info.name} ({info.default_weights}): "
            f"{type(error).__name__}: {reason}; check the network, or give a local file as weights"
        ) from error


def _resolve(name: str) -> tuple[Library, str]:
    """The library that knows ``name``, and the name inside it."""
    prefix, slash, rest = name.partition("/")
    if slash and prefix not in LIBRARIES:
        raise ModelError(f"unknown library {prefix!r} in the model name {name!r}; there are {', '.join(LIBRARIES)}")
    inner = rest if slash else name
    for candidate in [prefix] if slash else LIBRARIES:
        if not slash and candidate != "sidestream" and not may_have(candidate, inner):
            continue  # importing a library only to see that it does not know the name takes seconds
        for library in _libraries(candidate):
            if inner in library.names():
                return library, inner
    near = _nearest(inner, prefix if slash else None)
    raise ModelError(f"unknown model {name!r}; {near}list all with 'sidestream models'")


def is_saved(name: str) -> bool:
    """Whether ``name`` is a place that ``from_pretrained`` reads; the names of models come before those of folders."""
    if not os.path.isdir(name):
        return name.startswith("hf:")
    if os.sep not in name and not os.path.isfile(os.path.join(name, "config.json")):
        return False
    try:
        _resolve(name)
    except ModelError:
        return True
    return False


def _nearest(inner: str, prefix: str | None) -> str:
    if prefix is not None:
        known = {prefix: _names(prefix)}
    else:
        known = {each: _names(each) if each == "sidestream" else source_names(each) for each in reversed(LIBRARIES)}
    bare = {n: _full(each, n) for each, names in known.items() for n in names}
    near = difflib.get_close_matches(inner.lower(), bare, n=4, cutoff=0.5)
    return f"the nearest names are {', '.join(bare[n] for n in near)}; " if near else ""


def _full(prefix: str, inner: str) -> str:
    return inner if prefix == "sidestream" else f"{prefix}/{inner}"


def _names(prefix: str) -> list[str]:
    return [name for library in _libraries(prefix) for name in library.names()]


def _libraries(prefix: str) -> list[Library]:
    return [_library(prefix, module) for module in LIBRARIES[prefix]]


def _library(prefix: str, name: str) -> Library:
    module = cast(Library, importlib.import_module(f"sidestream.models.{name}"))
    try:
        module.names()
    except Exception as error:  # a torchvision that does not match torch fails with RuntimeError
        raise ModelError(
            f"the models of {prefix} cannot be used: {type(error).__name__}: {str(error).splitlines()[0]}; "
            "run 'sidestream doctor' to see how to mend it"
        ) from error
    return module
