"""Weights files: what fits loads exactly, everything else is refused with its reason and leaves the model as it was."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sidestream.errors import WeightsError, WriteError
from sidestream.models import load_weights, save_weights
from sidestream.models.clip_border import ClipBorder
from sidestream.models.weights import misfits


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    own = model.state_dict()
    assert own.keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        assert torch.equal(own[key], value), key


WRAPPINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "parallel": lambda state: {"module." + k: v for k, v in state.items()},
    "both": lambda state: {"state_dict": {"module." + k: v for k, v in state.items()}},
    "no batch counts": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pt_files_load_unwrapped(tmp_path, wrapping, suffix):
    model, other = small(0), small(1)
    torch.save(WRAPPINGS[wrapping](other.state_dict()), tmp_path / f"w{suffix}")
    assert load_weights(model, tmp_path / f"w{suffix}") is model
    assert_same(model, other)


def test_taking_off_a_prefix_is_said(tmp_path, caplog):
    torch.save(WRAPPINGS["both"](small(1).state_dict()), tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="sidestream.models.weights"):
        load_weights(small(), tmp_path / "w.pt")
    assert "'state_dict'" in caplog.text
    assert "'module.'" in caplog.text


def test_saved_weights_come_back_and_leave_no_part(tmp_path):
    model, other = small(0), small(1)
    assert save_weights(other, tmp_path / "w.safetensors") == tmp_path / "w.safetensors"
    assert_same(load_weights(model, tmp_path / "w.safetensors"), other)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_tied_weights_can_be_saved(tmp_path):
    model, other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_weights(model, save_weights(other, tmp_path / "tied.safetensors"))
    assert torch.equal(model[1].weight, other[0].weight)


def test_the_border_of_a_clip_model_is_not_in_its_keys(tmp_path):
    model, other = ClipBorder(small(0)), small(1)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert_same(model.net, other)
    assert_same(load_weights(small(2), save_weights(model, tmp_path / "back.safetensors")), other)


def without(state, *keys):
    return {k: v for k, v in state.items() if k not in keys}


WRONG = {
    "1 missing: 0.bias": lambda s: without(s, "0.bias"),
    # of the model's 9 keys the batch count may always be missing
    r"8 missing: 0\.weight, 0\.bias, 1\.weight and 5 more; 1 unexpected: x": lambda s: {"x": s["2.bias"]},
    "2 unexpected: head.bias, head.weight": lambda s: s | {"head.bias": torch.ones(1), "head.weight": torch.ones(2)},
    r"1 of another shape: 2\.weight \(file \(5, 4\), model \(2, 4\)\)": lambda s: s | {"2.weight": torch.zeros(5, 4)},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_misfit_is_named_and_nothing_is_loaded(tmp_path, message, suffix):
    path = tmp_path / f"wrong{suffix}"
    content = WRONG[message](small(1).state_dict())
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    model = small(0)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, path)
    assert_same(model, small(0))


def test_misfits_counts_by_hand():
    own = {"a": (1,), "b": (2,), "c": (3,), "d": (4,), "e": (5,)}
    assert misfits(own, own) == []
    assert misfits(own, {"e": (6,), "z": (1,)}) == [
        "4 missing: a, b, c and 1 more",
        "1 unexpected: z",
        "1 of another shape: e (file (6,), model (5,))",
    ]


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran code')",))


UNREADABLE = {
    "text.pt": lambda p: p.write_text("hello, I am text\n" * 9),
    "text.safetensors": lambda p: p.write_text("hello, I am text\n" * 9),
    "empty.pt": lambda p: p.write_bytes(b""),
    "empty.safetensors": lambda p: p.write_bytes(b""),
    "cut.pt": lambda p: (torch.save(small().state_dict(), p), p.write_bytes(p.read_bytes()[:700])),
    "code.pt": lambda p: torch.save({"a": Evil()}, p),
    "module.pt": lambda p: torch.save(small(), p),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_one_line_that_names_it(tmp_path, name):
    UNREADABLE[name](tmp_path / name)
    with pytest.raises(WeightsError, match="cannot be read as weights") as caught:
        load_weights(small(), tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3)])
def test_a_file_without_weights_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="holds no weights by name"):
        load_weights(small(), tmp_path / "other.pt")


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no weights file .*gone\.pt"):
        load_weights(small(), tmp_path / "gone.pt")
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"expected one of \.safetensors, \.pt"):
        load_weights(small(), tmp_path / "w.onnx")


def test_saving_says_what_is_wrong_and_leaves_nothing(tmp_path):
    with pytest.raises(WeightsError, match="safetensors"):
        save_weights(small(), tmp_path / "w.pt")
    with pytest.raises(WriteError, match="cannot write the weights file"):
        save_weights(small(), tmp_path / "nowhere" / "w.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(WriteError, match="cannot write the weights file"):
        save_weights(small(), tmp_path / "taken.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.safetensors"]
