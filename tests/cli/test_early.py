"""What is mistyped comes out before anything heavy is imported or made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sidestream.cli import main
from sidestream.cli.early import check_files, check_out_file, check_out_folder, check_source
from sidestream.errors import InputError, ModelError, SourceError, WeightsError, WriteError
from sidestream.models.create import check_model, list_models


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "no/such.mp4"],
        ["run", "no/such.mp4", "--model", "no-such-model"],
        ["compare", "no-such-model", "--accuracy", "no.jsonl"],
    ],
)
def test_a_missing_file_is_refused_before_torch_is_imported(command: list[str]) -> None:
    code = f"import sys; from sidestream.cli import main; print(main({command!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout.split() == ["2", "False"]
    assert "no" in done.stderr.splitlines()[-1]


def test_what_is_no_path_passes(tmp_path: Path) -> None:
    for source in ("camera:1", "synthetic:fps=3", "rtsp://host/x", "/dev/video7", str(tmp_path)):
        check_source(source)
    with pytest.raises(SourceError, match=r"cannot open no\.mp4"):
        check_source("no.mp4")
    check_files("--x", [Path(__file__)])
    with pytest.raises(InputError, match=r"--x no\.txt: there is no such file"):
        check_files("--x", [Path(__file__), Path("no.txt")])


def test_a_model_is_refused_without_being_made(tmp_path: Path) -> None:
    check_model("i3d", "random")
    check_model("i3d", Path(__file__))
    with pytest.raises(ModelError, match="nearest names are i3d"):
        check_model("i3e")
    with pytest.raises(WeightsError, match="i3d has no default weights"):
        check_model("i3d", "default")
    with pytest.raises(WeightsError, match="there is no weights file"):
        check_model("i3d", tmp_path / "no.pt")
    with pytest.raises(ModelError, match="there is no labels file"):
        check_model("i3d", None, tmp_path / "no.txt")


def test_compare_leaves_no_folder_when_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for flags in (["no-such-model"], ["i3d", "--parts", "speed"], ["i3d", "--accuracy", "no.jsonl"]):
        assert main(["compare", *flags, "--out", str(out)]) == 2
        assert not out.exists()


def test_a_library_in_the_pattern_lists_only_its_names() -> None:
    everything = list_models()
    for pattern in ("torchvision/vit*", "t*/resnet50", "timm/test_*", "tim[m]/test_vit"):
        found = list_models(pattern)
        assert found
        assert set(found) <= set(everything)
    assert {name.partition("/")[0] for name in list_models("t*/resnet50")} == {"timm", "torchvision"}


def test_places_where_nothing_can_be_written_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_text("kept")
    check_out_folder("--out", tmp_path)
    check_out_folder("--out", tmp_path / "a" / "b")
    check_out_file("--json", tmp_path / "new.json")
    check_out_file("--json", file)
    for folder in (file, file / "below"):
        with pytest.raises(WriteError, match=rf"--out {folder}: {file} is a file; give the name of a folder"):
            check_out_folder("--out", folder)
    with pytest.raises(WriteError, match=r"--json .* is a folder; give the name of a file"):
        check_out_file("--json", tmp_path)
    with pytest.raises(WriteError, match=rf"there is no folder {tmp_path / 'no'}; make it first"):
        check_out_file("--json", tmp_path / "no" / "x.json")
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]
    assert file.read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_in_which_not_even_root_may_write() -> None:
    with pytest.raises(WriteError, match=r"--out /proc/x: nothing can be written into /proc"):
        check_out_folder("--out", Path("/proc/x"))
    with pytest.raises(WriteError, match=r"--json /proc/x.json: nothing can be written into /proc"):
        check_out_file("--json", Path("/proc/x.json"))
