"""Models in folders and on the hub of Hugging Face: weights, what the model is, and a card.

    folder/
      model.safetensors    every weight, under the keys that weights files of this model have
      config.json          name, number of classes, head, dtype, labels, input spec, version
      README.md            the model card (``models.model_card``)

Loading makes the model by its name and loads the weights strictly, so nothing in a folder is run as code. It needs
no network for a local folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, snapshot_download
from torch import nn

from sidestream.errors import ModelError, SidestreamError, WeightsError, WriteError
from sidestream.models.create import create_model, key_map_of, model_info
from sidestream.models.info import attach_info, info_of
from sidestream.models.model_card import LIBRARY, TAGS, card_metadata, card_text
from sidestream.models.saved_config import CONFIG, DTYPES, config_of, head_of, read_config, spec_of
from sidestream.models.weights import grow_for, load_weights, loadable, misfits, save_weights

FilePath = str | os.PathLike[str]
Metrics = Mapping[str, Any]
HUB_PREFIX = "hf:"
WEIGHTS, CARD = "model.safetensors", "README.md"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(
    model: nn.Module, folder: FilePath, *, metrics: Metrics | None = None, note: str = "", license: str = "unknown"
) -> Path:
    """Write ``model``, made by ``create_model``, into ``folder``; give its path back.

    ``metrics``: measure -> value, ``note``: Markdown, ``license``: the hub's identifier of the weights' licence; all
    three go into the card. The folder is written beside its place and renamed; where it exists, its three files are
    replaced one by one, and whatever else is in it stays.

    Raises ``ModelError`` for a model that would not load again, ``WriteError`` where the folder cannot be written.
    """
    saved = SavedModel.of(model, metrics=metrics, note=note, license=license)
    target = Path(os.path.abspath(folder))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        saved.save_pretrained(part)
        _put(part, target)
    except OSError as error:
        raise WriteError(f"cannot write the model into {str(folder)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def from_pretrained(name_or_folder: FilePath, *, revision: str | None = None, token: str | None = None) -> nn.Module:
    """The model of a local folder, or of a repository of the hub ("USER/NAME" or "hf:USER/NAME"), in eval mode.

    The same class as ``create_model`` gives, with its ``ModelInfo``. A folder of that name wins over the hub.
    ``revision``: branch, tag or commit; ``token``: of a private repository (both: hub only).

    Raises ``WeightsError`` for a folder or repository that cannot be read, ``ModelError`` for one of another library
    or version.
    """
    name = os.fspath(name_or_folder)
    folder = name if os.path.isdir(name) else _download(name, revision, token)
    read_config(Path(folder))
    return SavedModel.from_pretrained(folder).net


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    metrics: Metrics | None = None,
    note: str = "",
    license: str = "unknown",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload ``model`` to the repository ``repo_id`` ("USER/NAME") of the hub, made if need be; its commit's address.

    Options as in ``save_pretrained``; ``private``: of a new repository, None for the account's default. Raises
    ``ModelError`` for a model that would not load again, ``WeightsError`` where the hub refuses or cannot be reached.
    """
    saved = SavedModel.of(model, metrics=metrics, note=note, license=license)
    with _hub_errors(f"cannot upload the model to {repo_id!r}"):
        return str(saved.push_to_hub(repo_id, private=private, token=token))


def create_saved(
    place: str,
    *,
    num_classes: int | None = None,
    weights: FilePath | None = None,
    labels: Sequence[str] | None = None,
    head: str = "classes",
) -> nn.Module:
    """What ``create_model`` answers for a folder or "hf:USER/NAME": the saved model, other labels if given."""
    if weights not in (None, "default"):
        raise WeightsError(f"{place!r} has its own weights, but {weights=} was given; leave one of them out")
    model = from_pretrained(place)
    own = info_of(model)
    assert own is not None  # from_pretrained hangs one on every model
    if head not in ("classes", head_of(own)):
        raise ModelError(f"{place!r} was saved with the head {head_of(own)!r}, but {head=} was given; leave it out")
    if num_classes not in (None, own.num_classes):
        raise ModelError(
            f"{place!r} answers {own.num_classes} {head_of(own)}, but {num_classes=} was given; leave it out"
        )
    return attach_info(model, own.with_classes(None, None if labels is None else tuple(labels)))


class SavedModel(PyTorchModelHubMixin, library_name=LIBRARY, tags=list(TAGS)):
    """A model with its config, as huggingface_hub's mixin saves, loads and uploads it; ``net`` is the model itself."""

    def __init__(self, net: nn.Module, config: dict[str, Any]) -> None:
        self.net, self.config = net, config
        self.metrics: Metrics = {}
        self.note, self.license = "", "unknown"

    @classmethod
    def of(cls, net: nn.Module, *, metrics: Metrics | None, note: str, license: str) -> SavedModel:
        """Raises ``ModelError`` for a model that would not load again."""
        saved = cls(net, config=config_of(net))
        _check_loads(net, saved.config)
        saved.metrics, saved.note, saved.license = metrics or {}, note, license
        return saved

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self.net, save_directory / WEIGHTS)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any], **hub: Any) -> SavedModel:  # type: ignore[override]
        return cls(_load(Path(model_id)), config=config)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        info = info_of(self.net)
        assert info is not None  # config_of has looked
        text = card_text(info, version=self.config["sidestream_version"], metrics=self.metrics, note=self.note)
        head = ModelCardData(**card_metadata(info, self.license))
        return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")


def _check_loads(net: nn.Module, config: dict[str, Any]) -> None:
    """Against a fresh model of that name, without memory."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            fresh = _fresh(config)
    except SidestreamError:
        raise
    except Exception:  # a few nets compute while they are made, which cannot be done without memory
        return
    grow_for(fresh, loadable(net).state_dict())
    shapes = [{key: value.shape for key, value in loadable(m).state_dict().items()} for m in (fresh, net)]
    if problems := misfits(*shapes):
        raise ModelError(
            f"this {type(net).__name__} is no longer what create_model makes of {config['name']!r}, so it would not "
            f"load again: {'; '.join(problems)}. Save the model itself, not its stream or a compiled or changed one"
        )
    if type(fresh) is not type(net):
        raise ModelError(
            f"create_model makes a {type(fresh).__name__} of {config['name']!r}, and this is a {type(net).__name__}: "
            "it would load as another model; save_weights(model, 'file.safetensors') saves what it holds"
        )


def _load(folder: Path) -> nn.Module:
    config = read_config(folder)
    try:
        model = _fresh(config)
    except ModelError as error:
        raise ModelError(f"{str(folder)!r} (of version {config['sidestream_version']}): {error}") from error
    is_usual = config["head"] == "classes"  # keys may be of another version of the library that the net comes from
    load_weights(model, folder / WEIGHTS, key_map=key_map_of(config["name"]) if is_usual else None)
    own = info_of(model)
    assert own is not None  # create_model hangs one on every model
    labels = None if config["labels"] is None else tuple(config["labels"])
    return attach_info(
        model, replace(own.with_classes(None, labels), labels=labels, input_spec=spec_of(config, folder))
    )


def _fresh(config: dict[str, Any]) -> nn.Module:
    head, num_classes = config["head"], config["num_classes"]
    usual = model_info(config["name"])  # first, since it knows no folders and no hub
    is_usual = head == "classes" and num_classes == usual.num_classes
    model = create_model(config["name"], num_classes=None if is_usual else num_classes, head=head)
    return model.to(DTYPES[config["dtype"]])


def _put(part: Path, target: Path) -> None:
    if not target.exists():
        os.rename(part, target)
        return
    for name in (WEIGHTS, CARD, CONFIG):
        os.replace(part / name, target / name)


def _download(name: str, revision: str | None, token: str | None) -> str:
    repository = name.removeprefix(HUB_PREFIX)
    if not _REPOSITORY.fullmatch(repository):
        raise WeightsError(
            f"there is no folder {name!r}, and it is no repository of the hub either; give the folder of "
            "save_pretrained, or 'USER/NAME'"
        )
    with _hub_errors(f"there is no folder {name!r}, and the hub's repository {repository!r} cannot be had"):
        return snapshot_download(repository, revision=revision, token=token, allow_patterns=[WEIGHTS, CONFIG])


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except SidestreamError:
        raise
    except Exception as error:  # no network, no such repository, no right to it: each in its own class
        reason = next(iter(str(error).strip().splitlines()), "no further reason given")[:160]
        raise WeightsError(
            f"{what}: {type(error).__name__}: {reason}; check the name, the token and the network"
        ) from error
