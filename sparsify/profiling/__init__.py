"""What a sparse model costs: MACs counted twice, and time and memory measured on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, cast

import timm
import torch
from torch import nn

from sparsify import ops
from sparsify.errors import SparsifyError, UsageError
from sparsify.nn import graft
from sparsify.profiling import analytic, latency, macs
from sparsify.profiling.latency import Timing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """What was measured: `dense`, `sparse` and `auto` in one interleaved run; peak memory in bytes."""

    dense: Timing
    sparse: Timing
    auto: Timing
    peak_memory_dense: int
    peak_memory_sparse: int


@dataclass(frozen=True)
class Profile:
    """Cost of a sparse model beside the dense model with the same parameters. MACs are per image, and theoretical.

    `as_dict` gives these keys. Whole numbers unless said otherwise.

    MACs (one multiply-accumulate counts once; sums, softmax, top-k and elementwise products count 0; norms by fvcore's
    estimate), counted by fvcore and by `analytic`, which must agree to the unit:

        macs_dense, macs_sparse             whole model
        mhsa_macs_dense, mhsa_macs_sparse   the paper's 'MHSA': attention of all blocks without its projections
                                            (sparse = kept_macs + prefix_macs + predictor_macs + tail_macs)
        kept_macs                           logits and values of the kept keys
        prefix_macs                         rows of the prefix tokens, which attend densely
        predictor_macs                      scores that choose the keys
        tail_macs                           what stands for the dropped keys
        unsupported                         mapping op -> occurrences: ops that fvcore could not count; best empty

    Parameters:

        param_count, param_count_dense      of the sparse and of the dense model

    Measured, absent when nothing was measured (floats):

        latency_ms_dense, latency_ms_sparse, latency_ms_auto          median per batch. sparse: the sparse form, dense
                                                                      fallback off; auto: what `backend=auto` runs
        latency_ms_{dense,sparse,auto}_p10, latency_ms_..._p90        spread of the same runs
        throughput_dense, throughput_sparse, throughput_auto          images per second at the median
        speedup_sparse                      latency_ms_dense / latency_ms_sparse, of the same interleaved run; below 1:
                                            slower than dense
        peak_memory_dense, peak_memory_sparse   bytes of the weights, the input and the peak of all other live tensors

    Circumstances:

        backend                             what computed the sparse form
        conditions                          mapping: img_size [height, width], always; where something was measured:
                                            batch_size, dtype, device, device_name, threads, runs, torch, timm, sparsify
        modules                             the tree, parents before children: list of name ('' is the model), depth,
                                            type and type_dense (class names; null: no such module there),
                                            params (of the sparse model), macs_dense, macs_sparse (all inclusive of
                                            children); attention modules: mhsa_macs_dense, mhsa_macs_sparse, kept_macs,
                                            prefix_macs, predictor_macs, tail_macs

    Attributes are named as the keys; what was measured is in `measured` (None: nothing).
    """

    macs_dense: int
    macs_sparse: int
    mhsa_macs_dense: int
    mhsa_macs_sparse: int
    kept_macs: int
    prefix_macs: int
    predictor_macs: int
    tail_macs: int
    unsupported: Mapping[str, int]
    param_count: int
    param_count_dense: int
    measured: Measured | None
    backend: str
    conditions: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...]

    @property
    def batch_size(self) -> int:
        """Images per measured batch."""
        return int(self.conditions.get("batch_size", 1))

    def as_dict(self) -> dict[str, Any]:
        """The documented keys, fit for JSON."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "measured"}
        found |= {name: dict(found[name]) for name in ("unsupported", "conditions")}
        found["modules"] = [dict(row) for row in self.modules]
        if self.measured is None:
            return found
        m = self.measured
        for name, timing in (("dense", m.dense), ("sparse", m.sparse), ("auto", m.auto)):
            found[f"latency_ms_{name}"] = timing.median
            found[f"latency_ms_{name}_p10"], found[f"latency_ms_{name}_p90"] = timing.p10, timing.p90
            found[f"throughput_{name}"] = timing.throughput(self.batch_size)
        found["speedup_sparse"] = m.dense.median / m.sparse.median
        found["peak_memory_dense"], found["peak_memory_sparse"] = m.peak_memory_dense, m.peak_memory_sparse
        return found


def profile(
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    backend: str = "auto",
    measure: bool = True,
    repeats: int | None = None,
    budget_s: float = latency.BUDGET_S,
) -> Profile:
    """Count and, unless `measure=False`, measure a sparse model beside its dense twin. `model` is left as it is.

    Args:
        model: a timm VisionTransformer with sparse attention (`sparsify.convert`, `sparsify.load`).
        img_size: height and width in pixels, or one number for both; None is the model's own. Another size needs
            a model made for it (or with `dynamic_img_size`).
        batch_size: images per measured batch; MACs are always per image.
        dtype: of the measurement: float32, float16 or bfloat16.
        device: where to measure.
        backend: how the sparse form is computed, one of `sparsify.ops.BACKENDS`.
        repeats: rounds to time; None: for about `budget_s` seconds, at least 5.

    Raises:
        UsageError: an unknown dtype, backend or device, a batch size below 1, an image size that the model cannot take.
        SparsifyError: not a sparse model; or the two counts of MACs differ, which is a bug.
    """
    attention = list(graft.sparse_modules(model))
    if not attention:
        raise SparsifyError("this model has no sparse attention: convert it first")
    place, precision = _check(batch_size, dtype, device, backend, repeats)
    image = _image(model, img_size)
    home = next(model.parameters()).device
    sparse = macs.replica(model, home)
    dense = graft.dense_twin(sparse)
    sparse_counts, dense_counts = macs.count(sparse, image, attention), macs.count(dense, image, attention)
    for name, counts, twin in (("sparse", sparse_counts, sparse), ("dense", dense_counts, dense)):
        if not counts.unsupported:
            verify(name, counts, analytic.count(macs.replica(twin, torch.device("meta")), _zeros(image, "meta", twin)))
    conditions: dict[str, Any] = {"img_size": list(image[1:])}
    measured = None
    if measure:
        sparse = macs.replica(model, place, precision)
        dense = graft.dense_twin(sparse)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, *image, generator=generator).to(place, precision)  # (B, C, H, W)
        measured = _measure(dense, sparse, images, repeats, budget_s)
        conditions |= _conditions(images, dtype, measured.sparse.runs)
    return Profile(
        macs_dense=dense_counts.total,
        macs_sparse=sparse_counts.total,
        mhsa_macs_dense=dense_counts.mhsa,
        mhsa_macs_sparse=sparse_counts.mhsa,
        **{f"{part}_macs": sparse_counts.part(part) for part in ("kept", "prefix", "predictor", "tail")},
        unsupported={**dense_counts.unsupported, **sparse_counts.unsupported},
        param_count=_params(sparse),
        param_count_dense=_params(dense),
        measured=measured,
        backend="reference" if backend == "auto" else backend,  # without a compiled kernel, auto is the reference
        conditions=conditions,
        modules=tuple(macs.tree(sparse, sparse_counts, dense, dense_counts)),
    )


def verify(name: str, counted: macs.Counts, expected: analytic.Analytic) -> None:
    """Raise `SparsifyError` where fvcore's count and the analytic one differ."""
    pairs = counted.part("dense") + counted.part("kept") + counted.part("prefix")
    for what, found, other in (
        ("whole model", counted.total, expected.total),
        ("kept pairs and prefix rows", pairs, expected.pairs),
        ("predictor", counted.part("predictor"), expected.predictor),
        ("tail", counted.part("tail"), expected.tail),
    ):
        if found != other:
            raise SparsifyError(
                f"MACs of the {name} model, {what}: fvcore counts {found}, the analytic count is {other}; no figure of "
                "this profile can be trusted. This is a bug in sparsify: please report it with the model's name"
            )


def _check(
    batch_size: int, dtype: str, device: str | torch.device, backend: str, repeats: int | None
) -> tuple[torch.device, torch.dtype]:
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: expected 1 or more")
    if repeats is not None and repeats < 1:
        raise UsageError(f"repeats {repeats}: expected 1 or more")
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    if backend not in ops.BACKENDS:
        raise UsageError(f"backend '{backend}': expected one of {', '.join(ops.BACKENDS)}")
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
    dynamic = bool(getattr(model, "dynamic_img_size", False))
    stride = cast(Any, model.patch_embed).patch_size
    whole = image[1] % stride[0] == 0 and image[2] % stride[1] == 0 and min(image) > 0
    if image != own and not (dynamic and whole):
        raise UsageError(
            f"image size {image[1]}x{image[2]}: this model takes {own[1]}x{own[2]}; load it with that image size"
        )
    return image


def _zeros(image: tuple[int, int, int], device: str, model: nn.Module) -> torch.Tensor:
    return torch.zeros(1, *image, device=device, dtype=next(model.parameters()).dtype)  # (1, C, H, W)


def _measure(
    dense: nn.Module, sparse: nn.Module, images: torch.Tensor, repeats: int | None, budget_s: float
) -> Measured:
    # No compiled kernel yet: what auto runs is the sparse reference itself, so it is not timed a second time.
    candidates: dict[str, Callable[[], object]] = {"dense": partial(dense, images), "sparse": partial(sparse, images)}
    wait = partial(torch.cuda.synchronize, images.device) if images.device.type == "cuda" else lambda: None
    memory = latency.peak_memory(dense, images), latency.peak_memory(sparse, images)
    found = latency.interleaved(candidates, rounds=repeats, budget_s=budget_s, synchronize=wait)
    return Measured(found["dense"], found["sparse"], found["sparse"], *memory)


def _conditions(images: torch.Tensor, dtype: str, runs: int) -> dict[str, Any]:
    try:
        version = metadata.version("sparsify-vit")
    except metadata.PackageNotFoundError:  # a checkout on the path
        version = "unknown"
    return {
        "batch_size": images.shape[0],
        "dtype": dtype,
        "device": str(images.device),
        "device_name": _device_name(images.device),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "sparsify": version,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


__all__ = ["Measured", "Profile", "profile", "verify"]
