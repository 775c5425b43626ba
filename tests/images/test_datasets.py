"""Claims about folders, archives and data sets as batches. Folders are made here; nothing is downloaded."""

from __future__ import annotations

import multiprocessing
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from sparsify.errors import BadData
from sparsify.images import datasets
from sparsify.images.digits import scans
from sparsify.images.loaders import ImageBatches
from sparsify.images.trainset import builtin_calibration, trainset
from sparsify.models.digits import network

ORDER = ImageNetInfo("imagenet-1k").label_names()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The red value of the first pixel: which picture it is. Top level, so that workers can be given it."""
    return torch.tensor([[[float(image.getpixel((0, 0))[0])]]])


def picture(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (red, 0, 0)).save(path)  # .png: lossless, so that red comes back


def broken(path: Path) -> None:
    """A JPEG header and nothing after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".whole.jpg")
    Image.effect_noise((64, 64), 50).save(whole)
    path.write_bytes(whole.read_bytes()[:300])
    whole.unlink()


def classes(root: Path, names: list[str], each: int = 2) -> Path:
    """Red is 10 x class (in the order given) + number of the picture."""
    for c, name in enumerate(names):
        for i in range(each):
            picture(root / name / f"{i}.png", 10 * c + i)
    return root


def pairs(loader: datasets.LabelledBatches) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for images, labels in loader for x, y in zip(images.flatten(), labels, strict=True)]


def reds(loader: ImageBatches) -> list[int]:
    return [int(x) for images in loader for x in images.flatten()]


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)


# preprocessing


def test_preprocessing_is_the_models_own(model):
    config = datasets.data_config(model)
    assert config["mean"] == (0.5, 0.5, 0.5) and config["crop_pct"] == 0.9  # augreg's, not ImageNet's
    config = datasets.data_config(model, img_size=48)
    tensor = datasets.transform(config)(Image.new("RGB", (70, 60), (255, 255, 255)))
    assert tensor.shape == (3, 48, 48) and tensor.dtype == torch.float32
    assert torch.allclose(tensor, torch.ones(3, 48, 48))  # (1 - 0.5) / 0.5


# labels


def test_class_folders_are_counted_in_order_of_their_names(tmp_path):
    loader = datasets.labelled(classes(tmp_path, ["cat", "dog", "owl"]), 3, to_tensor, batch_size=4)
    assert pairs(loader) == [(0, 0), (1, 0), (10, 1), (11, 1), (20, 2), (21, 2)]
    assert loader.total == 6 and loader.flaws.broken == 0
    images, labels = next(iter(loader))
    assert images.shape == (4, 1, 1, 1) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_numbered_folders_are_in_numeric_order(tmp_path):
    loader = datasets.labelled(classes(tmp_path, [str(i) for i in range(11)], 1), 11, to_tensor)
    assert [label for _, label in pairs(loader)] == list(range(11))  # not 0, 1, 10, 2, ...
    assert [red // 10 for red, _ in pairs(loader)] == list(range(11))


def test_val_inside_an_imagenet_root_is_found(tmp_path):
    classes(tmp_path / "train", ["a", "b", "c", "d"])
    classes(tmp_path / "val", ["a", "b"])
    assert len(pairs(datasets.labelled(tmp_path, 2, to_tensor))) == 4
    assert len(pairs(datasets.labelled(tmp_path / "train", 4, to_tensor))) == 8


def test_wnid_folders_map_to_imagenet_indices_even_when_few_are_present(tmp_path):
    names = [ORDER[7], ORDER[207], ORDER[999]]
    loader = datasets.labelled(classes(tmp_path, names, 1), 1000, to_tensor)
    assert pairs(loader) == [(0, 7), (10, 207), (20, 999)]
    assert loader.note == "3 of 1,000 imagenet-1k classes, mapped by wnid"


def test_wnid_folders_of_a_smaller_model_are_counted(tmp_path):
    loader = datasets.labelled(classes(tmp_path, [ORDER[7], ORDER[207]], 1), 2, to_tensor)
    assert pairs(loader) == [(0, 0), (10, 1)]


def test_wnid_that_is_no_imagenet_class_is_named(tmp_path):
    with pytest.raises(BadData, match="n99999999") as error:
        datasets.labelled(classes(tmp_path, [ORDER[0], "n99999999"]), 1000, to_tensor)
    one_line(error)


def test_other_number_of_classes_than_the_model_names_both(tmp_path):
    with pytest.raises(BadData, match="has 2 classes, but the model has 1,000") as error:
        datasets.labelled(classes(tmp_path, ["cat", "dog"]), 1000, to_tensor)
    one_line(error)


@pytest.mark.parametrize("num_classes", [0, None])
def test_features_need_no_number_of_classes(tmp_path, num_classes):
    assert pairs(datasets.labelled(classes(tmp_path, ["cat", "dog"], 1), num_classes, to_tensor)) == [(0, 0), (10, 1)]


def test_flat_folder_is_recognised_and_explained(tmp_path):
    for i in range(3):
        picture(tmp_path / f"ILSVRC2012_val_{i:08d}.png", i)
    with pytest.raises(BadData, match=r"holds 3 images but no class folders.*wnid") as error:
        datasets.labelled(tmp_path, 1000, to_tensor)
    one_line(error)


def test_images_beside_class_folders_are_left_out_and_told(tmp_path):
    picture(tmp_path / "preview.png", 99)
    loader = datasets.labelled(classes(tmp_path, ["cat", "dog"], 1), 2, to_tensor)
    assert pairs(loader) == [(0, 0), (10, 1)]
    assert loader.note == "1 images outside class folders left out"
    assert loader.total == 2 and loader.flaws.broken == 0


@pytest.mark.parametrize("kind", ["missing", "empty", "empty class folder", "file", "no tar"])
def test_nothing_to_read_gives_one_line(tmp_path, kind):
    path = tmp_path / ("x.tar" if kind == "no tar" else "x")
    if kind.startswith("empty"):
        (path / "cat" if "class" in kind else path).mkdir(parents=True)
    elif kind != "missing":
        path.write_text("no images")
    for read in (lambda: datasets.labelled(path, 2, to_tensor), lambda: trainset(path).calibration(4, 0, to_tensor)):
        with pytest.raises(BadData, match="x") as error:
            read()
        one_line(error)


def test_tar_of_class_folders_reads_as_the_folder_does(tmp_path):
    folder = classes(tmp_path / "f", [ORDER[3], ORDER[5]], 2)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, "val")
    for workers in (0, 2):
        loader = datasets.labelled(tmp_path / "x.tar", 1000, to_tensor, batch_size=1, workers=workers)
        assert pairs(loader) == pairs(datasets.labelled(folder, 1000, to_tensor)) == [(0, 3), (1, 3), (10, 5), (11, 5)]
    assert len(reds(trainset(tmp_path / "x.tar").calibration(3, 0, to_tensor))) == 3


# broken images


def test_broken_images_are_counted_and_not_replaced(tmp_path):
    classes(tmp_path, ["cat", "dog"], 2)
    broken(tmp_path / "cat" / "bad.jpg")
    (tmp_path / "dog" / "text.png").write_text("no image")
    loader = datasets.labelled(tmp_path, 2, to_tensor, batch_size=2)
    for _ in range(2):  # the second pass counts anew
        assert pairs(loader) == [(0, 0), (1, 0), (10, 1), (11, 1)]
        assert loader.flaws.broken == 2 and "bad.jpg" in loader.flaws.first_broken


def test_strict_names_the_first_broken_image(tmp_path):
    classes(tmp_path, ["cat", "dog"], 2)
    broken(tmp_path / "cat" / "bad.jpg")
    with pytest.raises(BadData, match=r"cannot read cat.bad\.jpg") as error:
        pairs(datasets.labelled(tmp_path, 2, to_tensor, strict=True))
    one_line(error)


def test_only_broken_images_is_an_error(tmp_path):
    broken(tmp_path / "bad.jpg")
    with pytest.raises(BadData, match="none of the 1 images could be read") as error:
        reds(trainset(tmp_path).calibration(4, 0, to_tensor))
    one_line(error)


def test_transform_errors_are_not_taken_for_broken_images(tmp_path):
    def wrong(image):
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        pairs(datasets.labelled(classes(tmp_path, ["cat", "dog"]), 2, wrong))


# images to calibrate on


def test_draw_is_the_same_for_a_seed_and_another_for_another(tmp_path):
    for i in range(40):
        picture(tmp_path / ("deep/er" if i % 2 else ".") / f"{i:02d}.png", i)
    first, again = (reds(trainset(tmp_path).calibration(10, 0, to_tensor, batch_size=4)) for _ in range(2))
    other = reds(trainset(tmp_path).calibration(10, 1, to_tensor))
    assert first == again and len(set(first)) == 10 and set(first) != set(other)
    assert sorted(reds(trainset(tmp_path).calibration(1000, 0, to_tensor))) == list(range(40))


def test_formats_beyond_timms_three_are_read(tmp_path):
    for i, suffix in enumerate((".png", ".webp", ".bmp", ".tif", ".PNG")):
        picture(tmp_path / f"{i}{suffix}", 10 * i)
    assert len(reds(trainset(tmp_path).calibration(9, 0, to_tensor))) == 5


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "I;16", "1"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode[0]}{len(mode)}.png")
    assert len(reds(trainset(tmp_path).calibration(9, 0, to_tensor))) == 5


# workers


def test_workers_give_the_same_batches_and_are_gone_afterwards(tmp_path):
    folder = classes(tmp_path, ["cat", "dog", "owl"], 5)
    broken(folder / "cat" / "bad.jpg")
    alone = datasets.labelled(folder, 3, to_tensor, batch_size=2)
    loader = datasets.labelled(folder, 3, to_tensor, batch_size=2, workers=2)
    assert pairs(loader) == pairs(alone)
    assert loader.flaws.broken == alone.flaws.broken == 1
    assert not multiprocessing.active_children()


def test_workers_end_when_the_reader_stops_early(tmp_path):
    loader = datasets.labelled(classes(tmp_path, ["cat", "dog"], 20), 2, to_tensor, batch_size=2, workers=2)

    def interrupted():
        for _ in loader:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    deadline = time.time() + 10
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_workers_end_with_an_error_even_while_it_is_held(tmp_path):
    folder = classes(tmp_path, ["cat", "dog"], 20)
    broken(folder / "cat" / "0.jpg")
    with pytest.raises(BadData) as error:
        pairs(datasets.labelled(folder, 2, to_tensor, batch_size=2, workers=2, strict=True))
    assert error.tb is not None and not multiprocessing.active_children()  # the traceback keeps the frames alive


def test_datasets_can_be_sent_to_spawned_workers(tmp_path):
    import pickle

    for loader in (
        datasets.labelled(classes(tmp_path, ["cat", "dog"]), 2, to_tensor),
        builtin_calibration(False, 2, 0, to_tensor),
    ):
        assert len(pickle.loads(pickle.dumps(loader.dataset))) == loader.total


# data sets by timm's prefixes


def test_torch_prefix_reads_a_torchvision_data_set_from_its_folder(tmp_path):
    folder = classes(tmp_path, ["cat", "dog"])
    assert len(pairs(datasets.labelled(f"torch/image_folder:{folder}", 2, to_tensor))) == 4
    with pytest.raises(BadData, match="3"):
        datasets.labelled(f"torch/image_folder:{folder}", 3, to_tensor)
    assert len(reds(trainset(f"torch/image_folder:{folder}").calibration(3, 0, to_tensor))) == 3


def test_torch_prefix_without_folder_says_how_to_give_it():
    with pytest.raises(BadData, match="torch/cifar10:FOLDER") as error:
        datasets.labelled("torch/cifar10", 10, to_tensor)
    one_line(error)


def test_torch_data_set_that_is_not_there_is_not_downloaded(tmp_path):
    with pytest.raises(BadData, match="torch/cifar10") as error:
        datasets.labelled(f"torch/cifar10:{tmp_path}", 10, to_tensor)
    one_line(error)


def test_missing_library_of_a_prefix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadData, match="hfds/someone/images") as error:
        datasets.labelled("hfds/someone/images", 10, to_tensor)
    one_line(error)


def test_streamed_data_set_has_no_known_length(monkeypatch):
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            return ((Image.new("RGB", (4, 4), (i, 0, 0)), i) for i in range(5))

    asked = []
    monkeypatch.setattr(datasets, "create_dataset", lambda name, **kw: asked.append((name, kw)) or Stream())
    loader = datasets.labelled("wds/shards:/somewhere", 10, to_tensor, batch_size=2)
    assert loader.total is None and pairs(loader) == [(i, i) for i in range(5)]
    assert asked == [("wds/shards", {"root": "/somewhere", "split": "validation"})]
    assert reds(trainset("wds/shards:/somewhere").calibration(3, 0, to_tensor)) == [0, 1, 2]


def test_hub_data_set_is_read_through_its_reader_so_that_broken_images_are_seen(monkeypatch, tmp_path):
    picture(tmp_path / "0.png", 5)
    (tmp_path / "1.png").write_text("no image")

    class Reader:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return open(tmp_path / f"{i}.png", "rb"), i

    monkeypatch.setattr(datasets, "create_dataset", lambda *a, **k: types.SimpleNamespace(reader=Reader()))
    loader = datasets.labelled("hfds/x", 10, to_tensor)
    assert pairs(loader) == [(5, 0)] and loader.flaws.broken == 1


@pytest.mark.parametrize("label, said", [(12, "label 12, but the model has 10"), (-1, "without labels")])
def test_label_that_the_model_cannot_give_is_an_error(monkeypatch, label, said):
    images = [(Image.new("RGB", (4, 4)), 3), (Image.new("RGB", (4, 4)), label)]
    monkeypatch.setattr(datasets, "create_dataset", lambda *a, **k: images)
    with pytest.raises(BadData, match=said) as error:
        pairs(datasets.labelled("hfds/x", 10, to_tensor))
    one_line(error)


# built in


needs_digits = pytest.mark.skipif(
    not (Path(scans.__file__).parent / scans.DATA_FILE).exists(), reason="digits data not made yet"
)


@needs_digits
def test_digits_is_the_test_split_and_its_train_split_calibrates():
    to = datasets.transform(datasets.data_config(network.build(pretrained=False)))
    test, train = datasets.labelled("digits", 10, to), datasets.labelled("digits:train", 10, to)
    assert test.total >= 500 and train.total + test.total == 1797
    images = next(iter(builtin_calibration(True, 4, 0, to)))
    assert images.shape == (4, 3, 28, 28)
    wanted = next(iter(trainset("digits:train").calibration(4, 0, to)))
    assert torch.equal(images, wanted)
    with pytest.raises(BadData, match="has 10 classes, but the model has 1,000"):
        datasets.labelled("digits", 1000, to)


def test_digits_has_no_other_split():
    with pytest.raises(BadData, match="train and test, not 'val'"):
        datasets.labelled("digits:val", 10, to_tensor)


def test_built_in_pictures_come_in_batches(model):
    loader = builtin_calibration(False, 5, 0, datasets.transform(datasets.data_config(model)), batch_size=2)
    assert [len(x) for x in loader] == [2, 2, 1] and loader.total == 5


# real photographs


def test_order_of_imagenet_classes_is_timms(real_data):
    assert (real_data / "imagenet-sample/synsets.txt").read_text().split() == ORDER


def test_real_photographs_are_mapped_by_wnid(real_data):
    to = datasets.transform({"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0})
    loader = datasets.labelled(real_data / "imagenet-sample", 1000, to, batch_size=50)
    labels = torch.cat([y for _, y in loader])
    folders = sorted(p.name for p in (real_data / "imagenet-sample/val").iterdir())
    assert labels.tolist() == [ORDER.index(name) for name in folders]  # one photograph for each class
    assert loader.flaws.broken == 0 and loader.total == 200
