"""What a sparse model costs: MACs counted twice, and time and memory measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsify.errors import SparsifyError, UsageError
from sparsify.measure import analytic, latency, macs, paper, paths
from sparsify.measure.conditions import PROFILE, conditions
from sparsify.measure.figures import Measured, PaperMacs, Profile, count_parameters
from sparsify.nn import graft, guard, hosts
from sparsify.nn.attention import Execution, attention_modules, check_sparse
from sparsify.nn.execution import check_execution, set_execution
from sparsify.ops import backends
from sparsify.processes import DTYPES, Compute

ACCOUNTINGS = ("product", "paper")


def profile(
    model: nn.Module,
    *,
    dense: nn.Module | None = None,
    img_size: int | tuple[int, int] | None = None,
    backbone_changed: bool = False,
    measure: bool = True,
    compute: Compute = Compute(),
    budget: latency.Budget = latency.Budget(),
    count_as: str = "product",
) -> Profile:
    """Count and, unless `measure=False`, measure a sparse model beside its dense original. Both models are left as they are.

    Args:
        model: a timm model with sparse attention (`sparsify.load`, or `.model` of what `sparsify.convert` returns).
        dense: the original. None: the model's own weights without sparsity; with `backbone_changed` no dense model, and
            no dense figures.
        img_size: height and width in pixels, or one number for both; None is the model's own. Another size needs
            a model made for it (or with `dynamic_img_size`).
        backbone_changed: the weights are no longer the dense original's: `auto` has no dense fallback and the model no
            dense twin.
        compute: of the measurement; batch_size: images per measured batch (1), MACs are always per image; workers and
            micro_batch have no effect.
        budget: how long to measure.
        count_as: one of `ACCOUNTINGS`; paper: also MHSA by the authors' accounting (`sparsify.measure.paper`).

    Example:
        >>> from sparsify.config import SparsityConfig
        >>> from sparsify.models.digits import network
        >>> figures = profile(graft.graft(network.build(), SparsityConfig(keep=0.25)), measure=False)
        >>> figures.macs_dense, figures.macs_sparse  # the whole model
        (196104576, 178016128)
        >>> figures.mhsa_macs_dense, figures.mhsa_macs_sparse  # attention without its projections
        (39740416, 21651968)
        >>> figures.kept_macs, figures.prefix_macs, figures.predictor_macs, figures.tail_macs  # what the latter consists of
        (8780800, 201728, 4942336, 7727104)

    Raises:
        UsageError: a value of `compute`, `budget` or `count_as` that is unknown, too small or cannot be used here; an
            image size that the model cannot take; a dense model that cannot be compared with it.
        SparsifyError: not a sparse model; or the two counts of MACs differ, which is a bug.
    """
    check_sparse(model)
    attention = list(attention_modules(model))
    _check(compute, count_as)
    execution = Execution(compute.backend, compute.kernel_precision)
    check_execution(execution, compute.torch_device, compute.torch_dtype, hosts.biased(model))
    image = _image(model, img_size)
    if dense is not None:
        graft.check_original(dense, model)
    device = next(model.parameters()).device
    sparse, beside = _replicas(model, dense, backbone_changed, partial(macs.replica, device=device))
    set_execution(sparse, Execution("reference"))  # MACs do not depend on it; no kernels are built to count
    dense_counts = None if beside is None else _count("dense", beside, image, attention)[0]
    sparse_counts, expected = _count("sparse", sparse, image, attention)
    authors: PaperMacs | None = None
    if count_as == "paper":
        present = [before for before, _ in expected.tokens]
        mhsa = paper.count(list(attention_modules(model).values()), present, hosts.num_prefix_tokens(model))
        authors = {"mhsa_macs_dense": mhsa.dense if beside is not None else None, "mhsa_macs_sparse": mhsa.sparse}
    measured: Measured | None = None
    choices: list[dict[str, Any]] = []
    backend, circumstances = compute.backend, {"img_size": list(image[1:])}
    if measure:
        models = _timed(model, dense, backbone_changed, compute)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(compute.batch_size or 1, *image, generator=generator)  # (B, C, H, W)
        images = images.to(compute.torch_device, compute.torch_dtype)
        choices = paths.taken(models["auto"], images)
        measured = _measure(models, images, budget)
        backend = backends.describe(backend, compute.kernel_precision, images.device, images.dtype, hosts.biased(model))
        known = {"batch_size": len(images), "device": str(images.device), "runs": measured.sparse.runs}
        circumstances |= conditions(PROFILE, compute, **known)
    return Profile(
        macs_dense=dense_counts.total if dense_counts else None,
        macs_sparse=sparse_counts.total,
        mhsa_macs_dense=dense_counts.mhsa if dense_counts else None,
        mhsa_macs_sparse=sparse_counts.mhsa,
        **{f"{part}_macs": sparse_counts.part(part) for part in ("kept", "prefix", "predictor", "tail", "full")},
        stage_macs=sparse_counts.stages,
        tokens=expected.tokens,
        unsupported={**(dense_counts.unsupported if dense_counts else {}), **sparse_counts.unsupported},
        param_count=count_parameters(sparse),
        param_count_dense=None if beside is None else count_parameters(beside),
        measured=measured,
        backend=backend,
        conditions=circumstances,
        modules=tuple(macs.tree(sparse, sparse_counts, beside, dense_counts)),
        choices=tuple(choices),
        paper=authors,
    )


def _check(compute: Compute, count_as: str) -> None:
    """Raise `UsageError` where an option cannot be understood, or the device cannot be used."""
    if compute.dtype not in DTYPES:
        raise UsageError(f"dtype '{compute.dtype}': expected one of {', '.join(DTYPES)}")
    _ = compute.torch_device  # refuses what is unknown
    if count_as not in ACCOUNTINGS:
        raise UsageError(f"count as '{count_as}': expected one of {', '.join(ACCOUNTINGS)}")


def _image(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width; refuses a size that the model would refuse."""
    own = macs.image_shape(model)
    image = macs.image_shape(model, (img_size, img_size) if isinstance(img_size, int) else img_size)
    if image == own:
        return image
    hosts.check_image_size(model, *image[1:])
    if not hosts.takes_any_size(model):
        size = f"image size {image[1]}x{image[2]}"
        raise UsageError(f"{size}: this model takes {own[1]}x{own[2]}; load it with that image size")
    return image


def _replicas(
    model: nn.Module, dense: nn.Module | None, backbone_changed: bool, replica: Callable[[nn.Module], nn.Module]
) -> tuple[nn.Module, nn.Module | None]:
    """Replicas of the sparse model, and of the dense model or its twin, if there is one."""
    sparse = replica(model)
    if dense is not None:
        return sparse, replica(dense)
    return sparse, None if backbone_changed else graft.dense_twin(sparse)


def _count(
    name: str, model: nn.Module, image: tuple[int, int, int], attention: list[str]
) -> tuple[macs.Counts, analytic.Analytic]:
    """Both counts of a model, held against each other unless fvcore met an op that it cannot count."""
    counts = macs.count(model, image, attention)
    dtype = next(model.parameters()).dtype
    images = torch.zeros(1, *image, device="meta", dtype=dtype)
    expected = analytic.count(macs.replica(model, images.device), images)
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


def _timed(model: nn.Module, dense: nn.Module | None, backbone_changed: bool, compute: Compute) -> dict[str, nn.Module]:
    """Replicas to time by name: dense (if there is one), sparse, and auto, which may fall back to dense attention."""
    replica = partial(macs.replica, device=compute.torch_device, dtype=compute.torch_dtype)
    sparse, beside = _replicas(model, dense, backbone_changed, replica)
    set_execution(sparse, Execution(compute.backend, compute.kernel_precision))
    auto = replica(sparse)
    guard.set_backend(auto, "auto", compute.kernel_precision, dense_allowed=not backbone_changed)
    models = {"sparse": sparse, "auto": auto}
    return models if beside is None else {"dense": beside, **models}


def _measure(models: Mapping[str, nn.Module], images: torch.Tensor, budget: latency.Budget) -> Measured:
    candidates: dict[str, Callable[[], object]] = {name: partial(model, images) for name, model in models.items()}
    dense_memory = latency.peak_memory(models["dense"], images) if "dense" in models else None
    memory = latency.peak_memory(models["sparse"], images)
    times = latency.interleaved(candidates, rounds=budget.rounds, budget_s=budget.seconds, device=images.device)
    return Measured(times.get("dense"), times["sparse"], times["auto"], dense_memory, memory)
