"""Models by name equal the libraries' own, and know what they want to be fed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models import (
    create_model,
    info_of,
    input_spec_of,
    labels_of,
    list_models,
    model_info,
    save_weights,
    timm_zoo,
    torchvision_zoo,
)
from sidestream.models.source_names import may_have, source_names


def same_net(seed, make):
    torch.manual_seed(seed)
    return make().eval()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("torchvision/mobilenet_v3_small", lambda: torchvision.models.mobilenet_v3_small()),
        ("timm/vit_tiny_patch16_224", lambda: timm.create_model("vit_tiny_patch16_224")),
    ],
)
@torch.no_grad()
def test_frame_models_equal_the_library(name, make):
    ours = same_net(3, lambda: create_model(name))
    theirs = same_net(3, make)
    frame_BCHW = torch.randn(1, 3, 224, 224)
    assert torch.equal(ours(frame_BCHW), theirs(frame_BCHW))
    assert not ours.training


@torch.no_grad()
def test_clip_models_equal_the_library_behind_the_border():
    ours = same_net(3, lambda: create_model("torchvision/r3d_18"))
    theirs = same_net(3, torchvision.models.video.r3d_18)
    clip_BTCHW = torch.randn(1, 5, 3, 32, 48)
    assert torch.equal(ours(clip_BTCHW), theirs(clip_BTCHW.permute(0, 2, 1, 3, 4)))


def test_bare_names_mean_own_then_torchvision_then_timm():
    assert model_info("efficientnet_lite0").library == "sidestream"
    assert model_info("resnet50").name == "torchvision/resnet50"
    assert model_info("resnet26d").name == "timm/resnet26d"
    assert model_info("timm/resnet50").name == "timm/resnet50"
    assert model_info("timm/efficientnet_lite0").input_spec.mean == timm.data.IMAGENET_DEFAULT_MEAN


def test_list_models_by_pattern():
    assert list_models("resnet50") == ["torchvision/resnet50", "timm/resnet50"]
    assert list_models("torchvision/r*_18") == ["torchvision/r2plus1d_18", "torchvision/r3d_18"]
    assert list_models("efficientnet_lite0") == ["efficientnet_lite0", "timm/efficientnet_lite0"]
    assert "timm/vit_tiny_patch16_224" in list_models("*vit_tiny*")
    assert list_models("no such thing") == []
    everything = list_models()
    assert len(set(everything)) == len(everything) > 1000
    assert set(timm.list_models()) <= {n.removeprefix("timm/") for n in everything if n.startswith("timm/")}


def test_every_torchvision_model_knows_its_input():
    for name in torchvision_zoo.names():
        info = model_info(f"torchvision/{name}")
        assert info.input_spec.layout == ("BTCHW" if info.task == "clip" else "BCHW")
        assert info.labels is None or len(info.labels) == info.num_classes


@pytest.mark.parametrize("name", ["resnet50", "swin_t", "inception_v3", "mvit_v2_s"])
def test_torchvision_input_spec_is_the_transform_of_its_weights(name):
    spec = model_info(name).input_spec
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert spec.size_px == (transform.crop_size[0], transform.crop_size[0])
    assert spec.resize_px == transform.resize_size[0]
    assert (list(spec.mean), list(spec.std)) == (list(transform.mean), list(transform.std))
    assert spec.interpolation == transform.interpolation.value


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet26d", "convnext_tiny", "efficientnet_b0"])
def test_timm_input_spec_is_the_one_that_timm_builds(name):
    """Read back from the transform that timm itself makes for the model."""
    config = timm.data.resolve_data_config(model=timm.create_model(name))
    resize, crop, *_, normalize = timm.data.create_transform(**config).transforms
    spec = model_info(f"timm/{name}").input_spec
    assert spec.resize_px == resize.size
    assert spec.size_px == tuple(crop.size)
    assert spec.interpolation == resize.interpolation.value
    torch.testing.assert_close(torch.tensor(spec.mean), normalize.mean)
    torch.testing.assert_close(torch.tensor(spec.std), normalize.std)


def test_labels_are_those_of_the_data_the_weights_were_trained_on():
    assert model_info("resnet50").labels[0] == "tench"
    assert model_info("timm/vit_tiny_patch16_224").labels[999] == "toilet tissue"
    assert model_info("r3d_18").labels[399] == "zumba"
    assert model_info("timm/vit_tiny_patch16_224.augreg_in21k").labels is None


def test_another_head_and_its_labels(tmp_path):
    model = create_model("timm/resnet18", num_classes=3, labels=["a", "b", "c"])
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert info_of(model).num_classes == 3
    assert labels_of(model) == ("a", "b", "c")
    assert labels_of(create_model("resnet18", num_classes=3)) is None
    (tmp_path / "labels.txt").write_text("x\ny\nz\n")
    assert labels_of(create_model("resnet18", num_classes=3, labels=tmp_path / "labels.txt")) == ("x", "y", "z")
    with pytest.raises(ModelError, match="answers 3 classes, but 2 labels were given"):
        create_model("resnet18", num_classes=3, labels=["a", "b"])
    with pytest.raises(ModelError, match="num_classes=0"):
        create_model("resnet18", num_classes=0)


def test_local_weights_are_loaded_strictly(tmp_path):
    model = create_model("resnet18", num_classes=5)
    path = save_weights(model, tmp_path / "five.safetensors")
    again = create_model("resnet18", num_classes=5, weights=path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"do not fit ResNet: 2 of another shape: fc\.weight \(file \(5, 512\)"):
        create_model("resnet18", weights=path)


def published_densenet_keys(state):
    import re

    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v for k, v in state.items()}


def with_aux_head(state):
    return state | {"aux1.conv.conv.weight": torch.zeros(128, 512, 1, 1), "aux2.fc1.bias": torch.zeros(1024)}


@pytest.mark.parametrize(
    ("name", "as_published"), [("densenet121", published_densenet_keys), ("googlenet", with_aux_head)]
)
def test_published_files_of_torchvision_load(tmp_path, name, as_published):
    state = create_model(name).state_dict()
    published = as_published(state)
    assert published.keys() != state.keys()
    torch.save(published, tmp_path / "published.pth")
    loaded = create_model(name, weights=tmp_path / "published.pth").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())


@torch.no_grad()
def test_googlenet_takes_the_usual_normalisation():
    """torchvision's own googlenet with trained weights shifts its input; ours does for any weights."""
    ours = create_model("googlenet")
    theirs = torchvision.models.googlenet(aux_logits=False, init_weights=False, transform_input=True).eval()
    theirs.load_state_dict(ours.state_dict())
    frame_BCHW = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(frame_BCHW), theirs(frame_BCHW))


def test_segmentation_needs_no_network():
    model = create_model("lraspp_mobilenet_v3_large")
    assert model(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 21, 64, 64)
    assert input_spec_of(model).size_px == (520, 520)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reznet50", r"unknown model 'reznet50'; the nearest names are torchvision/resnet50,.*sidestream models"),
        ("timm/vit_tinny_patch16_224", "nearest names are timm/vit_tiny_patch16_224"),
        ("tim/resnet50", "unknown library 'tim'.*there are sidestream, torchvision, timm"),
        ("torchvision/raft_small", "unknown model 'torchvision/raft_small'"),
        ("", "unknown model ''"),
    ],
)
def test_an_unknown_name_brings_the_nearest(name, message):
    with pytest.raises(ModelError, match=message):
        create_model(name)


def test_an_unknown_name_is_refused_without_importing_the_libraries():
    code = """
import sys
from sidestream.errors import ModelError
from sidestream.models import create_model
for name in ("reznet50", "no_such", "no/such", "sidestream/i3e"):
    try:
        create_model(name)
    except ModelError as error:
        print(error)
print({"timm", "torchvision", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True)
    lines = done.stdout.splitlines()
    assert "nearest names are torchvision/resnet50, timm/resnet50" in lines[0]
    assert lines[1] == "unknown model 'no_such'; list all with 'sidestream models'"
    assert "unknown library 'no'" in lines[2]
    assert "nearest names are i3d" in lines[3]
    assert lines[4] == "set()"


@pytest.mark.parametrize("zoo", [torchvision_zoo, timm_zoo], ids=["torchvision", "timm"])
def test_every_name_of_a_library_is_found_in_its_source(zoo):
    package = zoo.__name__.rpartition(".")[2].removesuffix("_zoo")
    assert all(may_have(package, name) for name in zoo.names())
    assert not may_have(package, "reznet50")
    assert len(zoo.names()) > 90
    functions = set(source_names(package))
    assert {n for n in zoo.names() if "." not in n} - functions == set()


@pytest.mark.parametrize(
    ("name", "zoo"), [("torchvision/resnet18", torchvision_zoo), ("timm/vit_tiny_patch16_224", timm_zoo)]
)
def test_without_a_network_the_error_says_which_weights_and_what_to_do(monkeypatch, name, zoo):
    def no_network(name):
        raise OSError("<urlopen error: no route to host>\nand more lines")

    monkeypatch.setattr(zoo, "build_default", no_network)
    with pytest.raises(
        WeightsError, match=f"default weights of {name} .*no route to host.*give a local file"
    ) as caught:
        create_model(name, weights="default")
    assert "\n" not in str(caught.value)


def test_default_weights_that_cannot_be():
    with pytest.raises(WeightsError, match="answer 1000 classes, but num_classes=7"):
        create_model("resnet18", num_classes=7, weights="default")
    nameless = next(n for n in timm.list_models() if not (timm.get_pretrained_cfg(n).has_weights))
    with pytest.raises(WeightsError, match="has no default weights"):
        create_model(f"timm/{nameless}", weights="default")


def test_default_weights_come_from_the_libraries_own_loaders(monkeypatch):
    """Which weights the hubs are asked for; nothing is fetched."""
    asked = {}

    def torchvision_loader(name, **arguments):
        asked[name] = arguments["weights"]
        return nn.Identity()

    def timm_loader(name, **arguments):
        asked[name] = arguments["pretrained"]
        return nn.Identity()

    monkeypatch.setattr(torchvision.models, "get_model", torchvision_loader)
    monkeypatch.setattr(timm, "create_model", timm_loader)
    create_model("torchvision/resnet50", weights="default")
    create_model("timm/resnet26d.bt_in1k", weights="default")
    assert asked == {"resnet50": torchvision.models.ResNet50_Weights.DEFAULT, "resnet26d.bt_in1k": True}


def test_a_library_that_cannot_be_imported_points_to_the_doctor(monkeypatch):
    def broken():
        raise RuntimeError("operator torchvision::nms does not exist\nsecond line")

    monkeypatch.setattr(torchvision_zoo, "names", broken)
    with pytest.raises(ModelError, match="torchvision::nms does not exist; run 'sidestream doctor'"):
        create_model("resnet50")


def test_a_model_made_elsewhere_has_no_info():
    assert info_of(nn.Identity()) is None
    assert input_spec_of(nn.Identity()) is None
    assert labels_of(nn.Identity()) is None


@pytest.mark.slow
def test_every_torchvision_model_can_be_made_without_a_network(monkeypatch):
    """On the meta device, where nothing is computed (regnets compute while they are made)."""

    def no_network(*args, **arguments):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with torch.device("meta"):
        for name in list_models("torchvision/*"):
            if "regnet" not in name:
                assert info_of(create_model(name)).name == name


@pytest.mark.slow
def test_every_timm_name_has_an_input_spec():
    for name in list_models("timm/*"):
        spec = model_info(name).input_spec
        assert min(spec.size_px) > 0
        assert spec.resize_px is None or spec.resize_px >= min(spec.size_px), name
