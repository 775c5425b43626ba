"""Claims about which files of a folder or archive are images: regular ones, each once, and the rest is counted."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from timm.data import create_dataset

from sparsify.errors import BadData
from sparsify.images import datasets, folders
from sparsify.images.loaders import read


def picture(path: Path, red: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (red, 0, 0)).save(path)
    return path


def pictures(root: Path, classes: str = "ab", each: int = 2) -> Path:
    for c in classes:
        for i in range(each):
            picture(root / c / f"{i}.png", i)
    return root


def images(path: Path) -> folders.Files:
    return folders.opened(path).images("")


def test_order_is_timms(tmp_path):
    for name in ("b/img10", "b/img9", "b/Img1", "a2/x", "a10/x", "a1/2_10", "a1/2_9"):
        picture(tmp_path / f"{name}.png")
    timms = create_dataset("", root=str(tmp_path)).reader
    assert images(tmp_path).names == [timms.filename(i) for i in range(len(timms))]


# links, pipes, loops


def test_a_pipe_is_left_out_and_counted(tmp_path):
    os.mkfifo(pictures(tmp_path) / "a" / "x.jpg")
    (tmp_path / "b" / "y.jpg").symlink_to(tmp_path / "a" / "x.jpg")
    loader = datasets.labelled(tmp_path, 2, lambda image: image)
    assert loader.total == 4 and loader.note == "left out: 2 pipes, sockets or devices"
    for name in ("set", "set.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadData, match="neither a folder nor a regular file"):
            folders.opened(tmp_path / name)


def test_loops_of_folders_end_and_count_nothing_twice(tmp_path):
    root = pictures(tmp_path / "set")
    (root / "a" / "again").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "above").symlink_to(tmp_path)  # would lead here by another way
    (root / "a" / "b").symlink_to(root / "b")
    (root / "self").symlink_to(root / "self")
    found = images(root)
    assert found.names == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert found.left == {"links to folders already read": 4}


def test_linked_folders_and_images_are_read_once_under_their_own_names(tmp_path):
    pool, root = pictures(tmp_path / "pool"), pictures(tmp_path / "set", "c")
    (root / "a").symlink_to(pool / "a")  # a class that lies elsewhere, as people lay out ImageNet
    (root / "A link").symlink_to(root / "c")  # before c by name, but c is no link
    for name, to in {
        "1st": pool / "b/0.png",
        "2nd": pool / "b/0.png",
        "3rd": root / "c/0.png",
        "4th": "nowhere",
    }.items():
        (root / "c" / f"{name}.png").symlink_to(to)
    found = images(root)
    assert found.names == ["a/0.png", "a/1.png", "c/0.png", "c/1.png", "c/1st.png", "c/4th.png"]
    assert found.left == {"links to folders already read": 1, "links to images already read": 2}
    assert read(found, 5).startswith("c/4th.png (")  # broken, and counted as that


def test_formats_that_are_not_read_are_counted_and_hidden_files_are_not(tmp_path):
    for name in ("a/x.gif", "a/y.GIF", "b/x.avif", ".git/x.png", "a/.ipynb_checkpoints/0.png", "b/._0.png"):
        (pictures(tmp_path) / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "a/0.png").read_bytes())
    (tmp_path / "b" / "photo.jfif").write_bytes((tmp_path / "a/0.png").read_bytes())
    (tmp_path / "b" / "notes.txt").write_text("no image")
    found = images(tmp_path)
    assert found.names == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/photo.jfif"]
    assert found.left == {".gif files": 2, ".avif files": 1}
    assert folders.left_out(found.left) == "left out: 1 .avif files, 2 .gif files"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_counted(tmp_path):
    (pictures(tmp_path) / "b").chmod(0)
    assert images(tmp_path).left == {"folders that cannot be read": 1}
    (tmp_path / "b").chmod(0o700)


# archives


def archive(path: Path, **files: Path | bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            tar.add(content, name)
    return path


def test_archive_and_folder_hold_the_same(tmp_path):
    root = pictures(tmp_path / "set", "ab", 3)
    picture(root / "a" / "deep" / "0.webp")
    (root / "a" / "x.gif").write_bytes(b"GIF")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, "./")
    folder, packed = images(root), images(tmp_path / "set.tar")
    assert packed.names == folder.names and packed.left == folder.left == {".gif files": 1}
    for i in range(len(folder)):
        assert packed.fetch(i)[0].read() == Path(folder.fetch(i)[0]).read_bytes()


def test_archives_in_an_archive_are_its_folders(tmp_path):
    for c in "ab":
        with tarfile.open(tmp_path / f"{c}.tar", "w") as tar:
            for i in range(2):
                tar.add(picture(tmp_path / c / f"{i}.png", i), f"{i}.png")
    (tmp_path / "c.tar").write_bytes(b"no archive")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for c in "abc":
            tar.add(tmp_path / f"{c}.tar", f"train/{c}.tar")
    items, note = datasets.class_images(tmp_path / "all.tar", 2, "", "measure")
    assert [(items.name(i), items.fetch(i)[1]) for i in range(4)] == [
        ("train/a/0.png", 0), ("train/a/1.png", 0), ("train/b/0.png", 1), ("train/b/1.png", 1),
    ]  # fmt: skip
    assert all(read(items, i).image.getpixel((0, 0)) == (i % 2, 0, 0) for i in range(4))
    assert note.endswith("left out: what follows the first 0 images of train/c.tar (cut off or damaged)")


@pytest.mark.parametrize(
    "kept, readable",
    [(1, None), (511, None), (512, 0), (600, 1), (1024, 1), (1100, 1), (1536, 1), (2047, 2), (2050, 2)],
)
def test_a_cut_archive_is_said_to_be_cut(tmp_path, kept, readable):
    root = pictures(tmp_path / "set", "ab", 1)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for c in "ab":
            tar.add(root / c / "0.png", f"{c}/0.png")  # 512 bytes of header and as many of pixels, each
    whole = (tmp_path / "x.tar").read_bytes()
    assert len(whole) > 4000 and images(tmp_path / "x.tar").left == {}
    (tmp_path / "x.tar").write_bytes(whole[:kept])
    if readable is None:
        with pytest.raises(BadData, match="not a .tar of images"):
            folders.opened(tmp_path / "x.tar")
        return
    found = images(tmp_path / "x.tar")
    assert sum(not isinstance(read(found, i), str) for i in range(len(found))) == readable
    assert "images of x.tar (cut off or damaged)" in folders.left_out(found.left)


@pytest.mark.parametrize("size", [10**12, 2**33 - 1, -512, -10240])
def test_a_member_that_claims_more_than_there_is_costs_nothing(tmp_path, size):
    member = tarfile.TarInfo("a/huge.png")
    member.size = size
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(picture(tmp_path / "0.png"), "a/0.png")
        tar.addfile(member)
    found = images(tmp_path / "x.tar")
    assert "cut off or damaged" in folders.left_out(found.left)
    assert not isinstance(read(found, 0), str)
    assert [read(found, i) for i in range(1, len(found))] in ([], ["a/huge.png (the archive is cut short)"])


def test_links_in_an_archive_are_counted(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(picture(tmp_path / "0.png"), "a/0.png")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("b/1.png")
            member.type, member.linkname = kind, "a/0.png"
            tar.addfile(member)
    found = images(tmp_path / "x.tar")
    assert found.names == ["a/0.png"] and found.left == {"links, pipes or sparse files in the archive": 3}
