"""ViViT and VideoMAE: against transformers and a plain restatement with the same weights; keys, specs, refusals."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sidestream.errors import LayoutError, MissingExtraError, ModelError, WeightsError
from sidestream.models import create_model, labels_of, list_models, model_info, save_weights, transformers_zoo
from sidestream.models.timesformer import TimeSformer
from sidestream.models.timesformer import map_keys as timesformer_keys
from sidestream.models.timesformer_embedding import Size
from sidestream.models.transformers_zoo import ClipTransformer, _reads_new_keys, classifier_net, map_keys
from sidestream.models.weights import load_state, load_weights
from sidestream.types import Clip
from sidestream.video import prepare

transformers = pytest.importorskip("transformers")
FAMILIES = ("Vivit", "VideoMAE")
each_family = pytest.mark.parametrize("family", FAMILIES)
ALL_NAMES = ["vivit_b_16x2", "videomae_small", "videomae_base", "videomae_large"]
NUM_HEADS = 4


def tiny_net(family: str, seed: int = 0) -> Any:
    """Hidden size 48, 2 layers, 4 frames of 16 x 24 in 2 x 2 x 3 patches; weights that show every mistake."""
    patch = {"tubelet_size": [2, 8, 8]} if family == "Vivit" else {"patch_size": 8}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": NUM_HEADS, "intermediate_size": 96}
    net: Any = classifier_net(family, image_size=(16, 24), num_frames=4, num_labels=5, **sizes, **patch)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return net.eval()


def random_clip(num_frames: int = 4, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(2, num_frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def check_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        scale = float(theirs[key].abs().max())  # gradients differ in size; sums run in another order
        assert scale > 0, key
        assert float((gradient - theirs[key]).abs().max()) <= 1e-4 * max(scale, 1.0), key


def gradients(logits_BN: Tensor, clip_BTCHW: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    weights_BN = torch.randn(logits_BN.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((logits_BN * weights_BN).sum(), [clip_BTCHW, *named.values()])
    return dict(zip(["clip", *named], found, strict=True))


@each_family
def test_equals_transformers_in_value_and_gradient(family: str) -> None:
    theirs, model = tiny_net(family), ClipTransformer(tiny_net(family, seed=7))
    load_state(model, map_keys(theirs.state_dict(), family), origin="transformers")
    clips = [random_clip().requires_grad_() for _ in range(2)]
    expected, actual = theirs(pixel_values=clips[0]).logits, model(clips[1])
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    found = gradients(actual, clips[1], dict(model.net.named_parameters()))
    check_gradients(found, gradients(expected, clips[0], dict(theirs.named_parameters())))


def attention(x_BND: Tensor, w: dict[str, Tensor], q: str, k: str, v: str) -> Tensor:
    """Head by head, with the scores written out."""
    queries, keys, values = (x_BND @ w[f"{n}.weight"].T + w.get(f"{n}.bias", torch.zeros(())) for n in (q, k, v))
    heads = []
    for part in torch.arange(x_BND.shape[-1]).chunk(NUM_HEADS):
        scores = queries[..., part] @ keys[..., part].mT / math.sqrt(len(part))
        heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ values[..., part])
    return torch.cat(heads, -1)


def norm(x: Tensor, w: dict[str, Tensor], key: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], key: str) -> Tensor:
    return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]


def patches(clip_BTCHW: Tensor, w: dict[str, Tensor], key: str) -> Tensor:
    """Tokens (B, N, D): frames first, then rows, then columns; a patch is (channel, frame, row, column)."""
    cut = clip_BTCHW.unfold(1, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)  # B, T', C, H', W', 2, 8, 8
    flat = cut.permute(0, 1, 3, 4, 2, 5, 6, 7).flatten(4).flatten(1, 3)
    return flat @ w[f"{key}.weight"].flatten(1).T + w[f"{key}.bias"]


def plain_vivit(clip_BTCHW: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = patches(clip_BTCHW, w, "vivit.embeddings.patch_embeddings.projection")
    x = torch.cat([w["vivit.embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + w["vivit.embeddings.position_embeddings"]
    for n in range(2):
        at = f"vivit.encoder.layer.{n}."
        own = {key.removeprefix(at): value for key, value in w.items() if key.startswith(at)}
        names = [f"attention.attention.{kind}" for kind in ("query", "key", "value")]
        seen = attention(norm(x, own, "layernorm_before", 1e-6), own, *names)
        x = x + linear(seen, own, "attention.output.dense")
        inner = linear(norm(x, own, "layernorm_after", 1e-6), own, "intermediate.dense")
        bent = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(bent, own, "output.dense")
    return linear(norm(x, w, "vivit.layernorm", 1e-6)[:, 0], w, "classifier")


def plain_videomae(clip_BTCHW: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = patches(clip_BTCHW, w, "videomae.embeddings.patch_embeddings.projection")
    places = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(24) / 24)  # "Attention is all you need", 3.5
    x = x + torch.stack([places.sin(), places.cos()], -1).flatten(1)
    for n in range(2):
        at = f"videomae.encoder.layer.{n}."
        own = {key.removeprefix(at): value for key, value in w.items() if key.startswith(at)}
        names = [f"attention.attention.{kind}" for kind in ("query", "key", "value")]
        seen = attention(norm(x, own, "layernorm_before", 1e-12), own, *names)
        x = x + linear(seen, own, "attention.output.dense")
        inner = linear(norm(x, own, "layernorm_after", 1e-12), own, "intermediate.dense")
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), own, "output.dense")
    return linear(norm(x.mean(1), w, "fc_norm", 1e-5), w, "classifier")


def as_published(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The keys of the files on the hub, written down from the conversion scripts of transformers 4."""
    if family == "VideoMAE":
        return {re.sub(r"\.(q)uery\.bias|\.(v)alue\.bias", r".\1\2_bias", key): v for key, v in state.items()}
    rules = {
        r"^vivit\.layers\.": "vivit.encoder.layer.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize(("family", "plain"), [("Vivit", plain_vivit), ("VideoMAE", plain_videomae)])
def test_equals_a_plain_restatement_of_the_net(family: str, plain: Any) -> None:
    model = ClipTransformer(tiny_net(family))
    named = dict(model.net.named_parameters())
    clip_BTCHW = random_clip().requires_grad_()
    state = named if family == "VideoMAE" else as_published(named, family)
    expected = plain(clip_BTCHW, state)
    actual = model(clip_BTCHW)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    check_gradients(gradients(actual, clip_BTCHW, named), gradients(expected, clip_BTCHW, named))


@each_family
def test_maps_are_the_hidden_states_place_by_place(family: str) -> None:
    model = ClipTransformer(tiny_net(family))
    with torch.no_grad():
        tokens_BND = model.net.base_model(pixel_values=random_clip()).last_hidden_state
        maps_BTDHW = model.features(random_clip())
    assert maps_BTDHW.shape == (2, 2, model.num_features, 2, 3)
    first = 1 if family == "Vivit" else 0
    for t in range(2):
        for row in range(2):
            for column in range(3):
                token_BD = tokens_BND[:, first + t * 6 + row * 3 + column]
                assert torch.equal(maps_BTDHW[:, t, :, row, column], token_BD)
    assert isinstance(model.get_submodule(model.classifier), nn.Linear)


@each_family
def test_published_files_load_strictly_and_keep_every_norm(family: str, tmp_path: Any) -> None:
    net = tiny_net(family)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    published = as_published(state, family)
    assert published.keys() != state.keys()
    file = tmp_path / "model.safetensors"
    save_file(published, file)
    model = load_weights(ClipTransformer(tiny_net(family, seed=7)), file, key_map=lambda s: map_keys(s, family))
    loaded = model.net.state_dict()
    assert len(loaded) == len(published)
    norms = [sorted(float(v.norm()) for v in values.values()) for values in (loaded, published)]
    assert norms[0] == norms[1]
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert map_keys(state, family).keys() == state.keys()
    net.config.save_pretrained(tmp_path)
    theirs = type(net).from_pretrained(tmp_path).state_dict()  # reads the same file by transformers' own renaming
    assert theirs.keys() == loaded.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.items())


@each_family
def test_an_older_transformers_is_given_the_older_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tiny_net(family).state_dict()
    published = as_published(state, family)
    monkeypatch.setattr(transformers_zoo, "_reads_new_keys", lambda family: False)
    assert map_keys(state, family).keys() == published.keys()
    assert map_keys(published, family).keys() == published.keys()


@pytest.mark.parametrize(("scheme", "theirs"), [("space", "space_only"), ("joint", "joint_space_time"),
                                                ("divided", "divided_space_time")])  # fmt: skip
def test_the_key_map_of_timesformer_keeps_every_tensor_and_norm(scheme: str, theirs: str) -> None:
    config = transformers.TimesformerConfig(
        image_size=16, patch_size=8, num_frames=2, hidden_size=12, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=48, attention_type=theirs, num_labels=3,
    )  # fmt: skip
    state = transformers.TimesformerForVideoClassification(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}
    mapped = timesformer_keys(dict(state))
    assert len(mapped) == len(state)
    norms = [[float(v.norm()) for v in values.values()] for values in (mapped, state)]
    assert norms[0] == norms[1]
    size = Size(dim=12, depth=3, num_heads=2, patch_px=8, size_px=(16, 16), num_frames=2)
    model = TimeSformer(3, scheme=scheme, size=size)
    load_state(model, mapped, origin="transformers")
    own = sum(float(p.square().sum()) for p in model.state_dict().values())
    assert own == pytest.approx(sum(float(p.square().sum()) for p in state.values()), rel=1e-6)


@each_family
def test_clips_that_the_net_was_not_made_for_are_refused(family: str) -> None:
    model, clip_BTCHW = ClipTransformer(tiny_net(family)), random_clip()
    with pytest.raises(LayoutError, match=r"\(2, 3, 4, 16, 24\); expected \(B, T, 3, H, W\).*use transpose\(1, 2\)"):
        model(clip_BTCHW.transpose(1, 2))
    for num_frames in (2, 5, 8):
        with pytest.raises(LayoutError, match=f"given {num_frames} frames; it takes exactly 4"):
            model(random_clip(num_frames))
    with pytest.raises(LayoutError, match="24 x 16 pixels; it takes exactly 16 x 24"):
        model(random_clip(4, 24, 16))
    with pytest.raises(LayoutError, match="given 6 frames"):
        model.features(random_clip(6))


@each_family
@torch.no_grad()
def test_transformers_itself_silently_drops_a_frame(family: str) -> None:
    """Why the number of frames is checked here."""
    net, clip_BTCHW = tiny_net(family), random_clip(5)
    assert torch.equal(net(pixel_values=clip_BTCHW).logits, net(pixel_values=clip_BTCHW[:, :4]).logits)


def test_another_net_is_refused() -> None:
    with pytest.raises(ModelError, match="given a Linear; expected VivitForVideoClassification or"):
        ClipTransformer(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="given a VivitModel"):
        ClipTransformer(tiny_net("Vivit").vivit)


@each_family
@torch.no_grad()
def test_compiles_and_exports(family: str) -> None:
    model, clip_BTCHW = ClipTransformer(tiny_net(family)), random_clip()
    exported = torch.export.export(model, (clip_BTCHW,)).module()
    torch.testing.assert_close(exported(clip_BTCHW), model(clip_BTCHW))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(clip_BTCHW), model(clip_BTCHW))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_what_is_promised_of_a_name_holds(name: str) -> None:
    assert name in list_models("vi*")
    info = model_info(name)
    with torch.device("meta"):
        model: Any = create_model(name)
    config = model.net.config
    assert (model.num_frames, model.size_px) == (info.input_spec.num_frames, info.input_spec.size_px)
    assert (model.num_frames, model.grid[1:]) == (32 if name == "vivit_b_16x2" else 16, (14, 14))
    assert config.num_labels == info.num_classes == len(info.labels or ()) == 400
    assert not info.input_spec.causal
    assert info.input_spec.min_frames is None
    width, depth = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "16x2": (768, 12)}[name.split("_")[-1]]
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (width, depth, 4 * width)


def random_video(height: int, width: int) -> Clip:
    shape = (3, height, width, 3)
    rgb_THWC = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Clip(rgb_THWC, (0.0, 0.1, 0.2))


@pytest.mark.parametrize("name", ["vivit_b_16x2", "videomae_base"])
def test_the_input_spec_prepares_as_the_processor_of_transformers(name: str) -> None:
    """On frames that are cropped, not resized, so that values and the place of the crop can be compared exactly."""
    if name == "vivit_b_16x2":  # as the authors train: to [-1, 1], and no second normalisation
        processor: Any = transformers.VivitImageProcessor(do_normalize=False)
        video = random_video(256, 300)
    else:
        from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        processor = transformers.VideoMAEImageProcessor(
            image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        )
        video = random_video(300, 224)
    theirs = processor(list(video.rgb_THWC.numpy()), return_tensors="pt").pixel_values
    torch.testing.assert_close(prepare(video, model_info(name).input_spec), theirs.float(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_come_back_and_another_head(tmp_path: Any) -> None:
    model = create_model("videomae_small", num_classes=3)
    again = create_model("videomae_small", num_classes=3, weights=save_weights(model, tmp_path / "w.safetensors"))
    clip_BTCHW = torch.randn(1, 16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert again(clip_BTCHW).shape == (1, 3)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(WeightsError, match="do not fit VideoMAEForVideoClassification"):
        create_model("videomae_small", weights=tmp_path / "w.safetensors")


def offer(monkeypatch: pytest.MonkeyPatch, folder: Any, family: str = "Vivit") -> None:
    monkeypatch.setitem(transformers_zoo.NAMES, "vivit_b_16x2", (family, str(folder), {}))


@torch.no_grad()
def test_default_weights_are_read_by_transformers_and_must_all_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """From a local folder in place of the hub's repository."""
    net = tiny_net("Vivit")
    net.save_pretrained(tmp_path / "whole")
    offer(monkeypatch, tmp_path / "whole")
    model = create_model("vivit_b_16x2", weights="default")
    assert torch.equal(model(random_clip()), net(pixel_values=random_clip()).logits)
    assert len(labels_of(model) or ()) == 400
    net.config.save_pretrained(tmp_path / "half")
    state = {key: v.clone() for key, v in net.state_dict().items() if key != "classifier.bias"}
    save_file(state, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    offer(monkeypatch, tmp_path / "half")
    with pytest.raises(WeightsError, match=r"do not fit vivit_b_16x2: .*missing_keys.*classifier\.bias"):
        create_model("vivit_b_16x2", weights="default")
    offer(monkeypatch, tmp_path / "nothing")
    with pytest.raises(WeightsError, match="cannot get the default weights of vivit_b_16x2"):
        create_model("vivit_b_16x2", weights="default")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert model_info("videomae_base").num_classes == 400  # what is known needs no package
    with pytest.raises(MissingExtraError, match=r"pip install 'sidestream\[transformers\]'"):
        create_model("videomae_base")


def test_kinetics_labels_are_in_the_order_of_the_weights() -> None:
    """transformers' documentation of ViViT shows class 116 for a video of someone eating spaghetti."""
    assert (model_info("vivit_b_16x2").labels or ())[116] == "eating spaghetti"


@pytest.mark.parametrize("family", ["Vivit", "VideoMAE"])
def test_to_look_at_keys_moves_no_random_number(family: str) -> None:
    _reads_new_keys.cache_clear()
    state = torch.get_rng_state()
    map_keys({}, family)
    _reads_new_keys(family)
    assert torch.equal(torch.get_rng_state(), state)
