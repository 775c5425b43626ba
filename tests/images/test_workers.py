"""Workers that die or find no shared memory: one line, for measuring and for training, and never a wait without end."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from sparsify.errors import SparsifyError
from sparsify.fit.finetune.batches import Batches, BatchSettings
from sparsify.images import datasets
from sparsify.images.loaders import Decoded, ImageBatches, Mapped
from sparsify.recipe import Augmentation

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


class Images:
    """Eight images; in a worker the sixth is the last that it reads, where `fatal`."""

    def __init__(self, fatal):
        self.fatal = fatal

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if self.fatal and index == 5 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (32, 32), (index, 0, 0))


def measured(fatal=False, workers=2):
    """How many images measuring or calibrating reads."""
    items = Mapped(Images(fatal))
    return sum(map(len, ImageBatches(Decoded(items, datasets.transform(CONFIG)), 2, workers)))


def trained(fatal=False, workers=2):
    """How many images two epochs of training read."""
    settings = BatchSettings(Augmentation(form="eval"), CONFIG, 0, 0, 4, 2, None, workers, world=1, rank=0)
    steps = Batches(Mapped(Images(fatal)), settings).from_step(0)
    return sum(len(batch.x) for _ in range(4) for batch in next(steps))


def test_the_handler_of_the_callers_children_stays():
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(ImageBatches(Decoded(Mapped(Images(False)), datasets.transform(CONFIG)), 2, 1))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    batches.close()


READERS = pytest.mark.parametrize("read, images", [(measured, 8), (trained, 16)])


@READERS
def test_a_worker_that_dies_is_one_line(read, images, monkeypatch):
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.1,))  # seconds between two looks, 5 without
    assert read() == images
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(SparsifyError, match="workers 2: one ended early") as error:
        read(fatal=True)
    assert "\n" not in str(error.value) and signal.getsignal(signal.SIGCHLD) is before


@READERS
def test_no_shared_memory_is_one_line(read, images, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in workers: they are forks
    with pytest.raises(SparsifyError, match="/dev/shm.* is full: .*shm-size.* or set workers 0$"):
        read()
    assert read(workers=0) == images


def test_workers_that_cannot_be_started_are_one_line(monkeypatch):
    def full(process):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(torch.multiprocessing.Process, "start", full)
    with pytest.raises(SparsifyError, match="workers 2: .*Cannot allocate memory: set fewer, or 0"):
        measured()


def test_with_a_tiny_dev_shm_nothing_waits_for_ever():
    """As in a container: 64 kB, where a batch is bigger."""
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from images import test_workers as t
t.CONFIG["input_size"] = (3, 224, 224)
for read in t.measured, t.trained:
    try: read()
    except t.SparsifyError as error: print(error)
"""
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$0" -c "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, sys.executable, code]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if ended.returncode == 77 or "unshare" in ended.stderr.split(":", 1)[0]:
        pytest.skip("no mounts of its own are allowed here")
    assert ended.returncode == 0, ended.stderr
    assert ["is full: give the container more" in line for line in ended.stdout.splitlines()] == [True, True]
