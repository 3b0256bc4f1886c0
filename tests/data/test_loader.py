"""``Loader``: each clip once, the same batches whatever the workers and wherever it starts, broken files left out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from data.video_files import make_folder, make_video

from sidestream.data import Batch, ClipDataset, ClipOptions, ClipRecord, Loader, open_dataset, synthetic_dataset
from sidestream.errors import InputError, SourceError
from sidestream.types import InputSpec

SPEC = InputSpec(size_px=(16, 16), layout="BTCHW", num_frames=3)


def synthetic(num_clips: int = 23, part="train") -> ClipDataset:
    return synthetic_dataset(spec=SPEC, part=part, num_clips=num_clips)


def same(a: Batch, b: Batch) -> bool:
    return (
        a.clip_BTCHW.equal(b.clip_BTCHW)
        and a.labels_B.equal(b.labels_B)
        and (a.keys, a.pts_seconds, a.number) == (b.keys, b.pts_seconds, b.number)
    )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_any_batch_of_any_epoch_is_the_same_whatever_the_workers(num_workers: int) -> None:
    wanted = {epoch: list(Loader(synthetic(), batch_size=5, num_workers=2).batches(epoch)) for epoch in (0, 2)}
    loader = Loader(synthetic(), batch_size=5, num_workers=num_workers)
    assert len(loader) == 5
    for epoch, start in ((2, 3), (0, 1), (0, 0), (2, 4)):
        found = list(loader.batches(epoch, start))
        assert len(found) == 5 - start
        assert all(same(a, b) for a, b in zip(found, wanted[epoch][start:], strict=True))


def test_state_resumes_in_the_middle_of_an_epoch() -> None:
    whole = Loader(synthetic(), batch_size=5)
    wanted = [batch for _ in range(2) for batch in whole]
    stopped = Loader(synthetic(), batch_size=5, num_workers=1)
    found = []
    for batch in stopped:
        found.append(batch)
        if batch.number == 2:
            break
    state = stopped.state()
    assert state == {"epoch": 0, "batch": 3}
    resumed = Loader(synthetic(), batch_size=5, num_workers=3)
    resumed.load_state(state)
    found += [batch for _ in range(2) for batch in resumed]
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    assert resumed.state() == {"epoch": 2, "batch": 0}


def test_an_epoch_has_each_clip_once_and_epochs_differ_in_order() -> None:
    loader = Loader(synthetic(), batch_size=4)
    keys = [[key for batch in loader.batches(epoch) for key in batch.keys] for epoch in range(2)]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(record.key for record in loader.dataset.records)
    assert keys[0] != keys[1]
    test = Loader(synthetic(part="test"), batch_size=4)
    assert [key for batch in test.batches(0) for key in batch.keys] == [f"test/{n}" for n in range(23)]


def test_collation() -> None:
    data = synthetic()
    batch = next(Loader(data, batch_size=5).batches(1))
    order = Loader(data, batch_size=5).order(1)[:5]
    for row, index in enumerate(order):
        item = data.item(index, 1)
        assert batch.clip_BTCHW[row].equal(item.clip_TCHW)
        assert int(batch.labels_B[row]) == item.label
    assert batch.labels_B.dtype == torch.int64
    assert batch.clip_BTCHW.shape == (5, 3, 3, 16, 16)


def test_each_clip_of_a_batch_has_its_own_times(tmp_path: Path) -> None:
    """12 frames of which 3 are taken, from where the clip's random numbers say."""
    data = open_dataset(make_folder(tmp_path / "set", num_clips=4), part="train", spec=SPEC)
    batch = next(Loader(data, batch_size=4).batches(0))
    of_key = {item.key: item.pts_seconds for item in (data.item(n, 0) for n in range(len(data)))}
    assert batch.pts_seconds == tuple(of_key[key] for key in batch.keys)
    assert len(set(batch.pts_seconds)) > 1


def test_shards_part_the_clips_evenly() -> None:
    shards = [Loader(synthetic(), batch_size=4, shard=(n, 3)) for n in range(3)]
    orders = [loader.order(5) for loader in shards]
    assert [len(order) for order in orders] == [7, 7, 7]
    assert len(set().union(*orders)) == 21
    assert {len(loader) for loader in shards} == {2}
    assert [len(list(loader.batches(5))) for loader in shards] == [2, 2, 2]


def test_drop_last() -> None:
    assert [len(b) for b in Loader(synthetic(), batch_size=5, drop_last=True).batches(0)] == [5, 5, 5, 5]
    with pytest.raises(InputError, match="too few for a whole batch of 50"):
        Loader(synthetic(), batch_size=50, drop_last=True)


def test_broken_files_are_named_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "set", num_clips=4)
    (folder / "in/garbage.mp4").write_bytes(b"not a video" * 100)
    (folder / "in/empty.avi").write_bytes(b"")
    whole = (folder / "out/0.mp4").read_bytes()
    (folder / "out/cut.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "notes.txt").write_text("no class")
    (folder / "in/notes.txt").write_text("no video")
    keys = []
    skipped = set()
    for part in ("train", "test"):
        data = open_dataset(folder, part=part, spec=SPEC)
        for _ in range(2):
            keys += [key for batch in Loader(data, batch_size=3).batches(0) for key in batch.keys]
        skipped |= data.skipped.keys()
        assert all(key.split("/")[1] in reason for key, reason in data.skipped.items())
    good = sorted(f"{name}/{n}.mp4" for name in ("in", "out") for n in range(4))
    assert sorted(keys) == sorted(good * 2)
    assert skipped == {"in/garbage.mp4", "in/empty.avi", "out/cut.mp4"}
    assert sum("skipped in/garbage.mp4" in message for message in caplog.messages) == 1


def test_without_one_readable_clip_it_is_an_error(tmp_path: Path) -> None:
    for n in range(6):
        path = tmp_path / "a" / f"{n}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="not one of 5 clips can be read; cannot open"):
        list(Loader(open_dataset(tmp_path, spec=SPEC), batch_size=2).batches(0))


def test_an_error_that_is_not_the_files_is_not_passed_over(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    spec = SPEC.replace(resize_px=8)
    loader = Loader(ClipDataset([ClipRecord(str(path), 0)], ["a"], spec=spec), batch_size=1)
    with pytest.raises(InputError, match="smaller than the crop"):
        list(loader.batches(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_half_used_epoch_leaves_no_thread_and_the_threads_of_torch_as_they_were(num_workers: int) -> None:
    before = torch.get_num_threads(), threading.active_count()
    batches = Loader(synthetic(), batch_size=2, num_workers=num_workers).batches(0)
    next(batches)
    batches.close()
    assert (torch.get_num_threads(), threading.active_count()) == before


def test_workers_use_one_thread_each() -> None:
    seen = []

    class Watched(ClipDataset):
        def item(self, index: int, epoch: int = 0):
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return super().item(index, epoch)

    base = synthetic(6)
    data = Watched(base.records, base.class_names, spec=SPEC, open_pictures=base._open)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(Loader(data, batch_size=2, num_workers=2).batches(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 6
    assert all(name.startswith("clip-decoder") and count == 1 for name, count in seen)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"num_workers": -1}, {"shard": (2, 2)}])
def test_wrong_options(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        Loader(synthetic(), **{"batch_size": 2, **change})


def test_an_item_that_cannot_be_read_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(SourceError, match=r"bad\.mp4"):
        ClipDataset([ClipRecord(str(tmp_path / "bad.mp4"), 0)], ["a"], options=ClipOptions())[0]
