"""A step of training on a device that is not there: every tensor is made on it, and only the loss is looked at.

With a backward pass on the meta device; forward passes and losses in mixed precision on a fake CUDA device.
"""

import contextlib
from types import SimpleNamespace

import accelerate
import pytest
import torch

from helpers.fake_gpu import fake_gpu
from sparsify.fit.finetune import run as runs
from sparsify.fit.finetune.batches import Batch
from sparsify.fit.finetune.loop import StageRun
from sparsify.fit.finetune.objective import Objective
from sparsify.fit.finetune.plan import resolve_precision
from sparsify.models.digits import network
from sparsify.nn import graft
from sparsify.nn.folding import unfold
from sparsify.recipe import load_recipe


class Accelerator:
    """As accelerate's on one GPU."""

    def __init__(self, device, dtype):
        self.device, self.num_processes, self.dtype, self.reduced = torch.device(device), 1, dtype, 0

    def autocast(self):
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()

    def no_sync(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, norm):
        torch.nn.utils.clip_grad_norm_(list(parameters), norm)

    def reduce(self, losses, how):
        self.reduced += 1
        return SimpleNamespace(tolist=lambda: [0.5] * len(losses))  # the one look of a step


STAGES = [
    (name, number) for name in ("distill", "paper", "paper-digits") for number in range(len(load_recipe(name).stages))
]


class Mixed(torch.nn.Module):
    """accelerate wraps a model so that its forward pass is under autocast."""

    def __init__(self, run, accelerator):
        super().__init__()
        self.inner, self.accelerator = Objective(run.student, run.stage, None), accelerator

    def forward(self, *inputs):
        with self.accelerator.autocast():
            return self.inner(*inputs)


@contextlib.contextmanager
def started(name, number, accelerator, monkeypatch):
    """The stage of a recipe on the accelerator's device, its objective, and two micro-batches."""
    recipe = load_recipe(name)
    teacher = network.build().requires_grad_(False)
    student = graft.graft(network.build(), recipe.sparsity)
    unfold(student)
    planned = SimpleNamespace(stage=recipe.stages[number], batches=SimpleNamespace(steps_per_epoch=5), steps=10)
    plan = SimpleNamespace(stages=[planned] * (number + 1), unfolds=True, folds_again=recipe.sparsity.fold, repair=None)
    context = SimpleNamespace(
        student=student, teacher=teacher, plan=plan, status=None, accelerator=accelerator,
        validator=SimpleNamespace(scale=None),
    )  # fmt: skip
    size, device = teacher.patch_embed.img_size, accelerator.device
    with fake_gpu(monkeypatch, student, teacher, device=device.type):
        run = StageRun(context, number)
        run.keep_schedule.set_step(3)
        run.student.train()
        x = torch.empty(4, teacher.patch_embed.proj.in_channels, *size, device=device)
        batch = Batch(x, torch.empty(4, teacher.num_classes, device=device), torch.arange(4, device=device))
        yield run, Mixed(run, accelerator), [batch, batch]


@pytest.mark.parametrize("name, number", STAGES)
def test_a_whole_step_of_a_recipe(name, number, monkeypatch):
    accelerator = Accelerator("meta", torch.float32)
    with started(name, number, accelerator, monkeypatch) as (run, objective, batches):
        losses = run._step(objective, run.optimizer, batches)
    assert losses and accelerator.reduced == 1
    moments = [t for state in run.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert moments and all(t.is_meta for t in moments if t.ndim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, number", STAGES)
def test_the_losses_of_a_recipe_in_mixed_precision(name, number, dtype, monkeypatch):
    accelerator = Accelerator("cuda:0", dtype)
    with started(name, number, accelerator, monkeypatch) as (run, objective, batches):
        with accelerator.autocast():
            teacher = run.teacher(batches[0].x)
        losses = objective(batches[0].x, batches[0].y, teacher)
        assert losses and all(loss.is_cuda and loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("device, current", [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_the_gpu_that_was_asked_for_trains(device, current, monkeypatch):
    """accelerate takes the process's current one."""
    made, chosen = {}, []
    monkeypatch.setattr(accelerate, "Accelerator", lambda **how: made.update(how))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    runs._accelerator("bfloat16", device)
    assert chosen == current and made["cpu"] == (device == "cpu") and made["mixed_precision"] == "bf16"


def test_auto_precision_is_bfloat16_where_the_gpu_has_instructions_for_it(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.update(how) or False)
    assert resolve_precision("auto", "cuda") == "float32" and asked == {"including_emulation": False}
    assert resolve_precision("float16", "cuda:1") == "float16"
