"""Claims about the batches of a stage: the same for any number of processes and workers, from any step on."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsify.errors import BadData, UsageError
from sparsify.fit.finetune.batches import Batch, Batches, BatchSettings
from sparsify.images import datasets
from sparsify.images.digits import scans
from sparsify.images.loaders import Items, Mapped, Part, StreamPart
from sparsify.images.trainset import trainset
from sparsify.recipe import Augmentation

CONFIG = {
    "input_size": (3, 12, 12),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
STRONG = Augmentation(color_jitter=0.4, erase=0.5)  # Python's and torch's random numbers
RAND = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random", erase=0.3)  # and numpy's
EVAL = Augmentation(form="eval")


def some_digits(count: int = 26) -> Part:
    return Part(Mapped(scans.Digits("train")), range(count))


def batches(
    items: Items | StreamPart | None = None, augmentation: Augmentation = STRONG, name: str = "the data", **how
) -> Batches:
    default = dict(seed=0, stage=0, batch_size=12, world=1, rank=0, micro_batch=12, workers=0, num_classes=10)
    settings = BatchSettings(augmentation, CONFIG, **{**default, **how})
    return Batches(some_digits() if items is None else items, settings, name)


def steps(made: Batches, first: int, count: int) -> list[list[Batch]]:
    iterator = made.from_step(first)
    found = list(islice(iterator, count))
    iterator.close()
    return found


def joined(micros: list[Batch]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*micros, strict=True))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(joined(a), joined(b), strict=True))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


def folder(root: Path, count: int) -> Path:
    """Red is 10 x number of the picture."""
    for i in range(count):
        Image.new("RGB", (9, 7), (10 * i, 0, 0)).save(root / f"{i}.png")
    return root


# what a batch is


def test_batch_has_normalised_images_soft_targets_and_places():
    items = some_digits()
    (batch,) = steps(batches(items, EVAL), 0, 1)[0]
    assert batch.x.shape == (12, 3, 12, 12) and batch.x.dtype == batch.y.dtype == torch.float32
    assert batch.y.shape == (12, 10) and batch.index.dtype == torch.int64
    to = datasets.transform(CONFIG)
    for x, y, index in zip(*batch, strict=True):
        image, label = items.fetch(int(index))
        assert torch.equal(x, to(image)) and y.argmax() == label and y.max() == 1


def test_labels_that_are_not_used_are_not_looked_at():
    unlabelled = Part(some_digits(), range(26), labels=False)
    for augmentation in (STRONG, Augmentation(mixup=0.8, cutmix=1.0)):
        for batch in steps(batches(unlabelled, augmentation, num_classes=None, micro_batch=4), 0, 1)[0]:
            assert batch.y is None and batch.x.shape == (4, 3, 12, 12)


@pytest.mark.parametrize(
    "augmentation", [Augmentation(smoothing=0.1), Augmentation(mixup=0.8, cutmix=1.0, smoothing=0.1)]
)
def test_targets_of_an_image_sum_to_one(augmentation):
    for batch in steps(batches(augmentation=augmentation, micro_batch=4), 0, 1)[0]:
        assert torch.allclose(batch.y.sum(1), torch.ones(4))
        assert torch.isclose(batch.y.min(), torch.tensor(0.01))  # 0.1 / 10 classes
        assert batch.y.max() <= 0.91 + 1e-6


def test_each_micro_batch_is_mixed_in_its_own_way():
    mixed = Augmentation(form="eval", mixup=1.0)
    shares = [batch.y.max(1).values.min() for batch in steps(batches(augmentation=mixed, micro_batch=2), 0, 1)[0]]
    assert len({round(float(share), 5) for share in shares}) > 3
    first, again = (steps(batches(augmentation=mixed, micro_batch=2), k, 1)[0] for k in (1, 1))
    assert same(first, again) and same(first, steps(batches(augmentation=mixed, micro_batch=2), 0, 2)[1])


# determinism


@settings(max_examples=20, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 6]),
    micro=st.integers(1, 12),
    step=st.integers(0, 7),
    augmentation=st.sampled_from([STRONG, RAND, EVAL]),
)
def test_processes_and_micro_batches_see_together_what_one_process_sees(world, micro, step, augmentation):
    whole = steps(batches(augmentation=augmentation), step, 1)[0]
    made = [batches(augmentation=augmentation, world=world, rank=r, micro_batch=micro) for r in range(world)]
    assert all(len(b.x) == m.micro <= micro for m in made for b in steps(m, step, 1)[0])
    assert same(whole, [batch for m in made for batch in steps(m, step, 1)[0]])


@settings(max_examples=15, deadline=None)
@given(step=st.integers(0, 9), augmentation=st.sampled_from([STRONG, RAND, Augmentation(mixup=0.8, cutmix=1.0)]))
def test_run_that_begins_at_a_step_sees_what_the_whole_run_saw(step, augmentation):
    how = dict(world=2, rank=1, micro_batch=2, augmentation=augmentation)
    whole, rest = steps(batches(**how), 0, step + 2), steps(batches(**how), step, 2)
    assert same(whole[step], rest[0]) and same(whole[step + 1], rest[1])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**64), stage=st.integers(0, 5), total=st.integers(12, 40))
def test_epoch_covers_distinct_images_in_an_order_of_its_own(seed, stage, total):
    made = batches(some_digits(total), EVAL, seed=seed, stage=stage, batch_size=5)
    per_epoch = made.steps_per_epoch
    assert per_epoch == total // 5
    seen = [index for step in steps(made, 0, 2 * per_epoch) for index in joined(step)[2].tolist()]
    first, second = seen[: 5 * per_epoch], seen[5 * per_epoch :]
    assert len(set(first)) == len(first) == len(second) == len(set(second)) == 5 * per_epoch and first != second


def test_seed_stage_and_epoch_change_the_order_and_the_augmentation():
    (first,) = steps(batches(), 0, 1)
    assert same(first, steps(batches(), 0, 1)[0])
    for other in (batches(seed=1), batches(stage=1)):
        assert joined(steps(other, 0, 1)[0])[2].tolist() != joined(first)[2].tolist()
    everything = dict(items=some_digits(12))
    epochs = [joined(step) for step in steps(batches(**everything), 0, 2)]
    a, b = (x[index.argsort()] for x, _, index in epochs)
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_random_numbers_of_the_caller_are_left_as_they_were():
    def state():
        return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()

    mixed = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase=1.0, mixup=0.8, cutmix=1.0)
    for workers in (0, 2):
        before = state()
        steps(batches(augmentation=mixed, workers=workers, micro_batch=4), 0, 3)
        assert state() == before
    torch.manual_seed(5)
    (first,) = steps(batches(augmentation=mixed), 0, 1)
    torch.manual_seed(6)
    assert same(first, steps(batches(augmentation=mixed), 0, 1)[0])


def test_workers_make_the_same_batches_and_are_gone_afterwards(tmp_path):
    items = trainset(folder(tmp_path, 14), None, False, 0, 0.1).learn
    (tmp_path / "3.png").write_text("no image")
    mixed = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase=0.5, mixup=0.8)
    how = dict(items=items, augmentation=mixed, micro_batch=2, batch_size=4, num_classes=None)
    alone, two = batches(**how), batches(**how, workers=2)
    for a, b in zip(steps(alone, 2, 5), steps(two, 2, 5), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.x, y.x) and torch.equal(x.index, y.index)
    assert alone.broken == two.broken and len(alone.broken) == 1
    assert not multiprocessing.active_children()


def test_what_workers_are_given_can_be_sent_to_spawned_ones():
    for augmentation in (EVAL, RAND, Augmentation(mixup=0.8)):
        made = batches(augmentation=augmentation)
        assert pickle.loads(pickle.dumps(made._maker)).settings.stage == 0
    assert len(pickle.loads(pickle.dumps(some_digits()))) == 26


# broken images


def test_next_image_stands_in_for_one_that_cannot_be_read(tmp_path):
    items = trainset(folder(tmp_path, 8), None, False, 0, 0).learn
    for name in ("2.png", "3.png", "7.png"):
        (tmp_path / name).write_text("no image")
    made = batches(items, EVAL, batch_size=8, micro_batch=2, num_classes=None)
    x, index = (torch.cat(parts) for parts in zip(*((b.x, b.index) for b in steps(made, 0, 1)[0]), strict=True))
    assert sorted(index.tolist()) == [0, 0, 1, 4, 4, 4, 5, 6]  # 4 for 2 and 3, 0 for 7
    assert torch.allclose((x[:, 0, 5, 5] + 1) / 2 * 255, 10.0 * index, atol=0.01)
    assert len(made.broken) == 3 and ".png (" in next(iter(made.broken.values()))
    steps(made, 0, 3)
    assert len(made.broken) == 3  # each is counted once


def test_image_that_stands_in_is_no_copy_of_itself(tmp_path):
    items = trainset(folder(tmp_path, 4), None, False, 0, 0).learn
    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "2.png")
    (tmp_path / "1.png").write_text("no image")
    (batch,) = steps(batches(items, batch_size=4, num_classes=None), 0, 1)[0]
    a, b = batch.x[batch.index == 2]
    assert not torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_broken_images_is_an_error(tmp_path, workers):
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("no image")
    items = trainset(tmp_path, None, False, 0, 0).learn
    made = batches(items, batch_size=2, num_classes=None, workers=workers, name="here")
    with pytest.raises(BadData, match=r"here: none of the 4 images can be read, as \d\.png \(") as error:
        next(made.from_step(0))
    one_line(error)


# errors


@pytest.mark.parametrize(
    "how, kind, said",
    [
        (dict(world=5), UsageError, "batch of 12 cannot be divided evenly among 5 processes: choose a multiple of 5"),
        (dict(batch_size=28, name="PATH"), BadData, "batch of 28 is larger than the 26 images of PATH: choose"),
        (dict(batch_size=6, world=2, augmentation=Augmentation(mixup=1)), UsageError, "even number .* not 3"),
        (dict(micro_batch=1, augmentation=Augmentation(cutmix=1)), UsageError, "micro-batch of 1, at least 2"),
        (dict(augmentation=Augmentation(auto_augment="no")), UsageError, "auto_augment no .* Unknown AA policy"),
        (dict(augmentation=Augmentation(interpolation="no")), UsageError, "interpolation no"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(how, kind, said):
    with pytest.raises(kind, match=said) as error:
        batches(**how)
    one_line(error)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "items, classes, said",
    [
        (Part(some_digits(), range(26), labels=False), 10, "here has images without labels"),
        (some_digits(), 3, r"here has a label \d, but the model has 3 classes"),
    ],
)
def test_label_that_the_model_cannot_give_is_an_error(items, classes, said, workers):
    with pytest.raises(BadData, match=said) as error:
        next(batches(items, num_classes=classes, workers=workers, name="here").from_step(0))
    one_line(error)


# micro-batches


@pytest.mark.parametrize(
    "share, most, mixes, micro",
    [(12, 5, False, 4), (12, 12, False, 12), (12, 99, False, 12), (13, 5, False, 1), (12, 3, True, 2), (6, 5, True, 2)],
)
def test_micro_batch_is_the_largest_divisor_of_the_share(share, most, mixes, micro):
    augmentation = Augmentation(mixup=float(mixes))
    assert batches(some_digits(60), augmentation, batch_size=2 * share, world=2, micro_batch=most).micro == micro


# streams


class Shards:
    """A stream of 10 digits; `begun` counts the passes."""

    begun = 0

    def __iter__(self):
        self.begun += 1
        source = some_digits(10)
        return (source.fetch(i) for i in range(10))


@settings(max_examples=15, deadline=None)
@given(world=st.sampled_from([1, 2, 4]), micro=st.integers(1, 4), step=st.integers(0, 12))
def test_stream_is_shared_by_the_processes_and_begins_again(world, micro, step):
    stream = StreamPart(Shards(), 2)  # 8 of its images
    whole = batches(stream, batch_size=4)
    assert whole.steps_per_epoch is None
    everything = steps(whole, 0, step + 1)
    start = 4 * step
    assert joined(everything[step])[2].tolist() == [i % 8 for i in range(start, start + 4)]
    made = [batches(stream, batch_size=4, world=world, rank=r, micro_batch=micro) for r in range(world)]
    assert same(everything[step], [batch for m in made for batch in steps(m, step, 1)[0]])
    assert not same(everything[step], steps(whole, step + 2, 1)[0])  # the same images, augmented anew


def test_stream_of_odd_length_goes_on_into_the_next_pass():
    made = batches(StreamPart(Shards(), 3), batch_size=4, workers=2)
    seen = torch.cat([joined(step)[2] for step in steps(made, 0, 5)]).tolist()
    assert seen == [i % 7 for i in range(20)]
    assert joined(steps(made, 4, 1)[0])[2].tolist() == seen[16:]
    assert same(steps(made, 0, 5)[4], steps(made, 4, 1)[0])


def test_passes_of_a_stream_that_are_skipped_whole_are_not_read():
    source = Shards()
    steps(batches(StreamPart(source), batch_size=4), 1000, 1)
    assert source.begun == 2


def test_stream_without_images_is_an_error():
    with pytest.raises(BadData, match="here has no training images") as error:
        next(batches(StreamPart([], 4), name="here").from_step(0))
    one_line(error)
