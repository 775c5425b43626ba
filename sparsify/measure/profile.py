"""What a sparse model costs: MACs counted twice, and time and memory measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from sparsify.errors import SparsifyError, UsageError
from sparsify.measure import analytic, latency, macs, paper, paths
from sparsify.measure.conditions import _conditions
from sparsify.measure.figures import Measured, PaperMacs, Profile
from sparsify.nn import graft, hosts
from sparsify.nn.attention import Execution, attention_modules
from sparsify.nn.execution import check_execution, set_execution
from sparsify.ops import backends
from sparsify.ops.auto import Chooser

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ACCOUNTINGS = ("product", "paper")


def profile(
    model: nn.Module,
    *,
    dense: nn.Module | None = None,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    backend: str = "auto",
    kernel_precision: str = "input",
    backbone_changed: bool = False,
    measure: bool = True,
    repeats: int | None = None,
    budget_s: float = latency.BUDGET_S,
    count_as: str = "product",
) -> Profile:
    """Count and, unless `measure=False`, measure a sparse model beside its dense original. Both models are left as they are.

    Args:
        model: a timm VisionTransformer with sparse attention (`sparsify.convert`, `sparsify.load`).
        dense: the original. None: the model's own weights without sparsity; with `backbone_changed` no dense model, and
            no dense figures.
        img_size: height and width in pixels, or one number for both; None is the model's own. Another size needs
            a model made for it (or with `dynamic_img_size`).
        batch_size: images per measured batch; MACs are always per image.
        dtype: of the measurement: float32, float16 or bfloat16.
        device: where to measure.
        backend: how the sparse form is computed, one of `sparsify.ops.backends.BACKENDS`.
        kernel_precision: input or bf16 (`sparsify.nn.attention.Execution`).
        backbone_changed: the weights are not the dense original's any more, so that `auto` has no dense fallback and
            the model no dense twin.
        repeats: rounds to time; None: for about `budget_s` seconds, at least 5.
        count_as: one of `ACCOUNTINGS`; paper: MHSA by the authors' accounting besides (`sparsify.measure.paper`).

    Raises:
        UsageError: an unknown dtype, backend, device or accounting, a backend that cannot be used here, a batch size
            below 1, an image size that the model cannot take, a dense model that cannot be compared with it.
        SparsifyError: not a sparse model; or the two counts of MACs differ, which is a bug.
    """
    attention = list(attention_modules(model))
    if not attention:
        raise SparsifyError("this model has no sparse attention: convert it first")
    place, kind = _check(batch_size, dtype, device, repeats)
    if count_as not in ACCOUNTINGS:
        raise UsageError(f"count as '{count_as}': expected one of {', '.join(ACCOUNTINGS)}")
    execution = Execution(backend, kernel_precision)
    check_execution(execution, place, kind, hosts.biased(model))
    image = _image(model, img_size)
    if dense is not None:
        graft.check_original(dense, model)
    home = next(model.parameters()).device
    sparse = macs.replica(model, home)
    set_execution(sparse, Execution("reference"))  # MACs do not depend on it; no kernels are built to count
    beside = _beside(sparse, dense, backbone_changed, home)
    dense_counts = None
    if beside is not None:
        dense_counts, _ = _count("dense", beside, image, attention)
    sparse_counts, expected = _count("sparse", sparse, image, attention)
    authors: PaperMacs | None = None
    if count_as == "paper":
        present = [before for before, _ in expected.tokens]
        mhsa = paper.count(list(attention_modules(model).values()), present, hosts.num_prefix_tokens(model))
        authors = {"mhsa_macs_dense": mhsa.dense if beside is not None else None, "mhsa_macs_sparse": mhsa.sparse}
    conditions: dict[str, Any] = {"img_size": list(image[1:])}
    measured, made = None, []
    if measure:
        sparse = macs.replica(model, place, kind)
        set_execution(sparse, execution)
        auto = macs.replica(sparse, place, kind)
        set_execution(auto, Execution("auto", kernel_precision, not backbone_changed, Chooser()))
        beside = _beside(sparse, dense, backbone_changed, place, kind)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, *image, generator=generator).to(place, kind)  # (B, C, H, W)
        made = paths.taken(auto, images)
        models = {"sparse": sparse, "auto": auto}
        measured = _measure(models if beside is None else {"dense": beside, **models}, images, repeats, budget_s)
        backend = backends.describe(backend, kernel_precision, place, kind, hosts.biased(model))
        conditions |= _conditions(images, dtype, measured.sparse.runs)
    return Profile(
        macs_dense=dense_counts.total if dense_counts else None,
        macs_sparse=sparse_counts.total,
        mhsa_macs_dense=dense_counts.mhsa if dense_counts else None,
        mhsa_macs_sparse=sparse_counts.mhsa,
        **{f"{part}_macs": sparse_counts.part(part) for part in ("kept", "prefix", "predictor", "tail", "full")},
        stage_macs=sparse_counts.stages,
        tokens=expected.tokens,
        unsupported={**(dense_counts.unsupported if dense_counts else {}), **sparse_counts.unsupported},
        param_count=_params(sparse),
        param_count_dense=None if beside is None else _params(beside),
        measured=measured,
        backend=backend,
        conditions=conditions,
        modules=tuple(macs.tree(sparse, sparse_counts, beside, dense_counts)),
        choices=tuple(made),
        paper=authors,
    )


def _beside(
    sparse: nn.Module, dense: nn.Module | None, changed: bool, place: torch.device, kind: torch.dtype | None = None
) -> nn.Module | None:
    """What stands beside a replica: a replica of the dense model given, the twin, or nothing."""
    if dense is not None:
        return macs.replica(dense, place, kind)
    return None if changed else graft.dense_twin(sparse)


def _count(
    name: str, model: nn.Module, image: tuple[int, int, int], attention: list[str]
) -> tuple[macs.Counts, analytic.Analytic]:
    """Both counts of a model, held against each other unless fvcore met an op that it cannot count."""
    counts = macs.count(model, image, attention)
    expected = analytic.count(macs.replica(model, torch.device("meta")), _zeros(image, "meta", model))
    if not counts.unsupported:
        verify(name, counts, expected)
    return counts, expected


def verify(name: str, counted: macs.Counts, expected: analytic.Analytic) -> None:
    """Raise `SparsifyError` where fvcore's count and the analytic one differ."""
    pairs = counted.part("full") + counted.part("kept") + counted.part("prefix")
    for what, found, other in (
        ("whole model", counted.total, expected.total),
        ("attention's pairs", pairs, expected.pairs),
        ("predictor", counted.part("predictor"), expected.predictor),
        ("tail", counted.part("tail"), expected.tail),
        ("choosing tokens", counted.stages, expected.stages),
    ):
        if found != other:
            raise SparsifyError(
                f"MACs of the {name} model, {what}: fvcore counts {found}, the analytic count is {other}; no figure of "
                "this profile can be trusted. This is a bug in sparsify: please report it with the model's name"
            )


def _check(
    batch_size: int, dtype: str, device: str | torch.device, repeats: int | None
) -> tuple[torch.device, torch.dtype]:
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: expected 1 or more")
    if repeats is not None and repeats < 1:
        raise UsageError(f"repeats {repeats}: expected 1 or more")
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    return place, DTYPES[dtype]


def _image(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width; refuses a size that the model would refuse."""
    own = macs.image_shape(model)
    if img_size is None:
        return own
    image = macs.image_shape(model, (img_size, img_size) if isinstance(img_size, int) else img_size)
    if image == own:
        return image
    hosts.check_image_size(model, *image[1:])
    if not hosts.takes_any_size(model):
        raise UsageError(
            f"image size {image[1]}x{image[2]}: this model takes {own[1]}x{own[2]}; load it with that image size"
        )
    return image


def _zeros(image: tuple[int, int, int], device: str, model: nn.Module) -> torch.Tensor:
    return torch.zeros(1, *image, device=device, dtype=next(model.parameters()).dtype)  # (1, C, H, W)


def _measure(
    models: Mapping[str, nn.Module], images: torch.Tensor, repeats: int | None, budget_s: float
) -> Measured:  # fmt: skip
    candidates: dict[str, Callable[[], object]] = {name: partial(model, images) for name, model in models.items()}
    wait = partial(torch.cuda.synchronize, images.device) if images.device.type == "cuda" else lambda: None
    memory = [latency.peak_memory(models[name], images) if name in models else None for name in ("dense", "sparse")]
    found = latency.interleaved(candidates, rounds=repeats, budget_s=budget_s, synchronize=wait)
    return Measured(found.get("dense"), found["sparse"], found["auto"], memory[0], cast(int, memory[1]))


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
