"""Models in folders and on the hub: everything comes back, nothing half written, and what does not fit is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sidestream as ss
from sidestream.errors import ModelError, WeightsError, WriteError
from sidestream.models import create_model, info_of, labels_of, list_models, pretrained
from sidestream.models.frame import frame_by_frame
from sidestream.models.info import attach_info
from sidestream.types import InputSpec

FILES = ["README.md", "config.json", "model.safetensors"]
CHEAP = ["tsm_mobilenet_v2_online", "cnn_lstm", "frame_efficientnet_lite0", "timm/test_vit", "mobilenet_v3_small"]
OWN = [name for name in list_models() if "/" not in name]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which huggingface_hub reads once, when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("timm/test_resnet", **({"num_classes": 3} | options))


def example(info: Any) -> Tensor:
    """As small as the model takes it."""
    spec: InputSpec = info.input_spec
    fixed = spec.min_frames is None and spec.layout == "BTCHW"
    size_px = spec.size_px if fixed or re.search("vit|former", info.name) else (64, 64)
    frames = (spec.min_frames or spec.num_frames,) if spec.layout == "BTCHW" else ()
    return torch.randn(1, *frames, 3, *size_px, generator=torch.Generator().manual_seed(1))


def answers(model: nn.Module, given: Tensor) -> list[Tensor]:
    with torch.no_grad():
        given_answer = model(given)
    return list(torch.utils._pytree.tree_leaves(given_answer))


def check_round_trip(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, labels=["a", "b", "c"])
    info = info_of(model)
    assert info is not None
    changed = info.input_spec.replace(mean=(0.1, 1 / 3, 0.5), std=(0.2, 0.7, 1e-3), frame_step=7)
    attach_info(model, replace(info, input_spec=changed))
    again = ss.from_pretrained(ss.save_pretrained(model, folder))
    assert type(again) is type(model)
    assert info_of(again) == info_of(model)
    assert ss.input_spec_of(again) == changed
    assert labels_of(again) == ("a", "b", "c")
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
        assert state[key].dtype == value.dtype
    for ours, theirs in zip(answers(again, example(info)), answers(model, example(info)), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@pytest.mark.parametrize("name", CHEAP)
def test_everything_comes_back(name: str, tmp_path: Path) -> None:
    check_round_trip(name, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OWN if name not in CHEAP])
def test_every_own_model_comes_back(name: str, tmp_path: Path) -> None:
    check_round_trip(name, tmp_path / "model")


@pytest.mark.parametrize("head", ["keypoints", "masks"])
def test_dense_heads_come_back(head: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("tsm_mobilenet_v2_online", num_classes=4, head=head)
    again = ss.from_pretrained(ss.save_pretrained(model, tmp_path / "model"))
    clip_BTCHW = torch.randn(1, 2, 3, 64, 64)
    assert torch.equal(answers(again, clip_BTCHW)[0], answers(model, clip_BTCHW)[0])
    assert info_of(again) == info_of(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_weights_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small().to(dtype)
    again = ss.from_pretrained(ss.save_pretrained(model, tmp_path / "model"))
    frame_BCHW = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert answers(again, frame_BCHW)[0].dtype == dtype
    assert torch.equal(answers(again, frame_BCHW)[0], answers(model, frame_BCHW)[0])


def test_a_folder_of_an_older_transformers_loads(tmp_path: Path) -> None:
    """Its nets had other keys, which the model's key map knows."""
    pytest.importorskip("transformers")
    folder = ss.save_pretrained(create_model("videomae_small", num_classes=3), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"\.(q)uery\.bias|\.(v)alue\.bias", r".\1\2_bias", key): value for key, value in state.items()}
    assert len(renamed.keys() - state.keys()) == 24
    save_file(renamed, folder / "model.safetensors")
    loaded: Any = ss.from_pretrained(folder)
    assert all(torch.equal(value, state[key]) for key, value in loaded.net.state_dict().items())


def test_labels_that_are_not_known_stay_unknown(tmp_path: Path) -> None:
    """Also where the library has labels for as many classes."""
    model = create_model("timm/test_resnet", num_classes=1000)
    info = info_of(model)
    assert info is not None
    assert info.labels is not None
    attach_info(model, replace(info, labels=None))
    assert labels_of(ss.from_pretrained(ss.save_pretrained(model, tmp_path / "model"))) is None


def test_what_is_written(tmp_path: Path) -> None:
    model = small(labels=["a", "b", "c"])
    folder = ss.save_pretrained(
        model, tmp_path / "new" / "model", metrics={"top-1, a|b": 0.123456789}, note="Trained *here*.", license="mit"
    )
    assert folder == tmp_path / "new" / "model"
    config = json.loads((folder / "config.json").read_text())
    spec = config.pop("input_spec")
    assert config == {
        "library_name": "sidestream",
        "sidestream_version": ss.__version__,
        "name": "timm/test_resnet",
        "head": "classes",
        "num_classes": 3,
        "dtype": "float32",
        "labels": ["a", "b", "c"],
    }
    assert spec.keys() == set(InputSpec.__dataclass_fields__)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "sidestream")
    assert card.data.pipeline_tag == "image-classification"
    assert {"video", "streaming", "test_resnet"} <= set(card.data.tags or [])
    for part in (
        "Trained *here*.",
        "| top-1, a\\|b | 0.123456789 |",
        "Single frames",
        "less the mean (0.5, 0.5, 0.5)",
    ):
        assert part in card.text, part
    plain = ModelCard.load(ss.save_pretrained(model, tmp_path / "plain") / "README.md")
    assert plain.data.license == "unknown"
    assert "## Results" not in plain.text


def test_the_card_says_how_clips_are_cut() -> None:
    from sidestream.models.model_card import spec_in_words

    spec = InputSpec(
        layout="BTCHW", num_frames=16, min_frames=2, frame_step=4, resize_px=256, causal=False, delay_ticks=3
    )
    words = " ".join(spec_in_words(spec))
    for part in ("Clips of 16 frames", "from 2 on", "one frame in 4", "shorter side is 256", "the middle 224 x 224",
                 "may depend on later", "3 frames after"):  # fmt: skip
        assert part in words, part
    assert "resized to 8 x 9 pixels" in " ".join(spec_in_words(InputSpec(size_px=(8, 9))))


@pytest.mark.parametrize("name", ["timm/test_resnet", "tsm_mobilenet_v2"])
def test_the_program_on_the_card_runs(name: str, tmp_path: Path) -> None:
    folder = ss.save_pretrained(create_model(name, num_classes=3), tmp_path / "model")
    ss.write(tmp_path / "clip.mp4", ss.stream("synthetic", max_frames=20), frame_rate=10)
    program = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    program = program.replace("path/to/this/folder", str(folder)).replace("clip.mp4", str(tmp_path / "clip.mp4"))
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(program, names)
    assert names["answer" if name.startswith("timm") else "logits_BN"].shape == (1, 3)


def test_a_folder_is_replaced_file_by_file_and_never_left_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ss.save_pretrained(small(), tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    ss.save_pretrained(small(num_classes=5), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert info_of(ss.from_pretrained(folder)).num_classes == 5  # type: ignore[union-attr]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_weights", "card_text"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrained, name, full)
            for target in (folder, tmp_path / "other"):
                with pytest.raises(WriteError, match=r"cannot write the model into .*No space left on device"):
                    ss.save_pretrained(small(), target)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        ss.save_pretrained(small(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_models_that_would_not_load_again_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a Linear without a name was given"):
        ss.save_pretrained(nn.Linear(2, 2), tmp_path / "model")
    model: Any = create_model("tsm_mobilenet_v2_online", num_classes=3)
    with pytest.raises(ModelError, match=r"no longer what create_model makes of 'tsm_mobilenet_v2_online'.*its stream"):
        ss.save_pretrained(model.streaming(), tmp_path / "model")
    changed: Any = small()
    changed.fc = nn.Linear(changed.fc.in_features, 7)
    with pytest.raises(ModelError, match=r"2 of another shape: fc\.weight"):
        ss.save_pretrained(changed, tmp_path / "model")
    with pytest.raises(ModelError, match=r"makes a ResNet of '.*', and this is a FrameByFrame"):
        ss.save_pretrained(frame_by_frame(small()), tmp_path / "model")  # its keys are those of the image model
    mixed: Any = small()
    mixed.fc.half()
    with pytest.raises(ModelError, match=r"types \['float16', 'float32'\]"):
        ss.save_pretrained(mixed, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_saving_does_not_move_the_random_numbers(tmp_path: Path) -> None:
    model = small()
    state = torch.get_rng_state()
    ss.save_pretrained(model, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"library_name": "timm"}, ModelError, r"is not of Sidestream .*create_model\(name, weights=file\)"),
        ({"library_name": "gone"}, ModelError, "is not of Sidestream"),
        ({"precision": 8}, ModelError, "fields that this version .* does not know: precision; .*update Sidestream"),
        ({"input_spec": {"colour": "bgr"}}, ModelError, "has input_spec fields that .* does not know: colour"),
        ({"num_classes": "gone"}, ModelError, "has 'num_classes' = None; expected int"),
        ({"labels": "abc"}, ModelError, "has 'labels' = 'abc'; expected list"),
        ({"dtype": "int3"}, ModelError, "has the dtype 'int3'; expected one of float32"),
        (
            {"name": "timm/test_resnett"},
            ModelError,
            r"\(of version .*\): unknown model 'timm/test_resnett'; the nearest",
        ),
        ({"name": "hf:some/where", "head": "masks"}, ModelError, "unknown model 'hf:some/where'|unknown library"),
        ({"num_classes": 4}, WeightsError, r"2 of another shape: fc\.weight \(file \(3, .*model \(4, "),
        ({"name": "timm/test_vit"}, WeightsError, "do not fit VisionTransformer: .*missing"),
        ({"head": "nose"}, ModelError, "head='nose' is unknown"),
        ({"labels": ["a"]}, ModelError, "answers 3 classes, but 1 labels"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: Any, error: Any, message: str, tmp_path: Path) -> None:
    folder = ss.save_pretrained(small(), tmp_path / "model")
    rewrite(folder, **changes)
    with pytest.raises(error, match=message):
        ss.from_pretrained(folder)


def test_an_input_spec_of_an_older_version_has_the_defaults(tmp_path: Path) -> None:
    folder = ss.save_pretrained(small(), tmp_path / "model")
    rewrite(folder, input_spec={"size_px": [7, 8]})
    assert ss.input_spec_of(ss.from_pretrained(folder)) == InputSpec(size_px=(7, 8))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no readable config\.json in .*No such file"):
        ss.from_pretrained(tmp_path)
    folder = ss.save_pretrained(small(), tmp_path / "model")
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    for damaged in (weights[:100], weights[:-10], b"", b"x" * 200):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            ss.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="there is no weights file"):
        ss.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for text in (config[:50], "", "\x00"):
        (folder / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"config\.json' is damaged: it is not JSON"):
            ss.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="is not of Sidestream"):
        ss.from_pretrained(folder)
    (folder / "config.json").write_text(config)
    assert ss.from_pretrained(folder) is not None


def test_create_model_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(labels=["a", "b", "c"])
    folder = str(ss.save_pretrained(model, tmp_path / "model"))
    for options in ({}, {"weights": "default"}, {"num_classes": 3}):
        again = create_model(folder, **options)  # type: ignore[arg-type]
        assert info_of(again) == info_of(model)
        assert torch.equal(again.state_dict()["fc.weight"], model.state_dict()["fc.weight"])
    assert labels_of(create_model(folder, labels=["x", "y", "z"])) == ("x", "y", "z")
    with pytest.raises(WeightsError, match=r"has its own weights, but weights='other\.pt'"):
        create_model(folder, weights="other.pt")
    with pytest.raises(WeightsError, match="has its own weights, but weights='random'"):
        create_model(folder, weights="random")
    with pytest.raises(ModelError, match="answers 3 classes, but num_classes=4"):
        create_model(folder, num_classes=4)
    with pytest.raises(ModelError, match="saved with the head 'classes', but head='masks'"):
        create_model(folder, head="masks")
    monkeypatch.chdir(tmp_path)
    assert info_of(create_model("model")) == info_of(model)
    Path("empty").mkdir()
    with pytest.raises(ModelError, match="unknown model 'empty'"):
        create_model("empty")
    with pytest.raises(WeightsError, match="no readable config"):
        create_model("./empty")
    Path("model").rename("resnet18")  # the names of models come first
    assert info_of(create_model("resnet18")).name == "torchvision/resnet18"  # type: ignore[union-attr]
    assert info_of(create_model("./resnet18")) == info_of(model)


def test_the_command_line_takes_a_folder_as_the_model(tmp_path: Path) -> None:
    from sidestream.cli.plan import ModelFlags, load_model
    from sidestream.cli.predict import predict

    model = small(labels=["ant", "bee", "cow"])
    folder = ss.save_pretrained(model, tmp_path / "model")
    ss.write(tmp_path / "clip.mp4", ss.stream("synthetic", max_frames=3), frame_rate=10)
    assert predict(str(tmp_path / "clip.mp4"), model=str(folder), top_k=3, json=tmp_path / "out.json") == 0
    spec = ss.input_spec_of(model)
    assert spec is not None
    frames = [ss.prepare(frame, spec) for frame in ss.stream(str(tmp_path / "clip.mp4"))]
    with torch.no_grad():
        mean_N = torch.cat([model(frame_BCHW) for frame_BCHW in frames]).mean(0)
    expected = dict(zip(["ant", "bee", "cow"], mean_N.tolist(), strict=True))
    found = {top["label"]: top["logit"] for top in json.loads((tmp_path / "out.json").read_text())["top"]}
    assert found == pytest.approx(expected, abs=1e-5)
    streamed, labels, _ = load_model(ModelFlags(model=str(folder)))  # of sidestream run
    assert labels == ("ant", "bee", "cow")
    assert torch.equal(streamed.state_dict()["fc.weight"], model.state_dict()["fc.weight"])


class StubApi:
    """Stands for the hub: takes what is uploaded."""

    uploaded: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        if repo_id.startswith("stranger/"):
            raise PermissionError("403 Forbidden\nmore lines")
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        files = {p.name: p.read_bytes() for p in folder_path.iterdir()}
        StubApi.uploaded = {"repo_id": repo_id, "files": files, "token": self.token}
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_push_uploads_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", StubApi)
    model = small()
    address = ss.push_to_hub(model, "someone/model", metrics={"top-1": 0.5}, note="N.", token="secret")
    assert address == "https://huggingface.co/someone/model/commit/1"
    folder = ss.save_pretrained(model, tmp_path / "model", metrics={"top-1": 0.5}, note="N.")
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert StubApi.uploaded == {"repo_id": "someone/model", "files": expected, "token": "secret"}
    assert sorted(expected) == FILES
    with pytest.raises(WeightsError, match="cannot upload the model to 'stranger/x': PermissionError: 403 Forbidden;"):
        ss.push_to_hub(model, "stranger/x")
    with pytest.raises(ModelError, match="without a name"):
        ss.push_to_hub(nn.Linear(1, 1), "someone/model")


def test_the_hub_is_asked_for_the_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    folder = ss.save_pretrained(model, tmp_path / "model")
    asked = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    files = ["model.safetensors", "config.json"]
    found = [
        ss.from_pretrained("someone/model", revision="v2", token="secret"),
        ss.from_pretrained("hf:someone/model"),
        create_model("hf:someone/model"),
    ]
    assert all(info_of(each) == info_of(model) for each in found)
    assert asked[0] == ("someone/model", {"revision": "v2", "token": "secret", "allow_patterns": files})
    assert asked[1:] == [("someone/model", {"revision": None, "token": None, "allow_patterns": files})] * 2


def test_without_a_network_the_error_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no folder 'some/where', and the hub's repository 'some/where' cannot be"):
        ss.from_pretrained("some/where")
    with pytest.raises(WeightsError, match=r"the hub's repository 'some/where' cannot be had: .*; check the name"):
        create_model("hf:some/where")
    with pytest.raises(WeightsError, match="there is no folder 'nowhere', and it is no repository"):
        ss.from_pretrained("nowhere")
    with pytest.raises(WeightsError, match="cannot upload the model to 'some/where': OfflineModeIsEnabled"):
        ss.push_to_hub(small(), "some/where")
