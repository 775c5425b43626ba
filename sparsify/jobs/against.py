"""The job behind `sparsify profile --against`: dense and converted in several runtimes, all in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError, UsageError, as_arguments, one_line
from sparsify.jobs.runtimes import RUNTIMES, Request, Run, Runtime
from sparsify.measure import latency, macs
from sparsify.measure.against import CONVERTED, DENSE, Against, Way, compare
from sparsify.measure.conditions import AGAINST, conditions
from sparsify.nn import graft
from sparsify.nn.attention import check_sparse
from sparsify.processes import Compute, Say

ALL = "all"
CPU = torch.device("cpu")
APART = 0.1  # relative difference of dense answers that no rounding to bfloat16 explains


def profile_against(
    model: nn.Module,
    runtimes: Sequence[str] = (ALL,),
    *,
    dense: nn.Module | None = None,
    backbone_changed: bool = False,
    compute: Compute = Compute(),
    budget: latency.Budget = latency.Budget(),
    say: Say = lambda line: None,
) -> Against:
    """Measures a converted model and its dense original in each runtime, in turns. Both models are left as they are.

    Args:
        runtimes: names of `RUNTIMES`, or all: those that can run here, the others are left out with the reason; int8 ones
            only where the dtype is not float32.
        dense: the original. None: the model's own weights without sparsity; with `backbone_changed` no dense model.
        backbone_changed: the weights are no longer the dense original's: `auto` has no dense fallback.
        compute, budget: as of `sparsify.measure.profile.profile`; backend and kernel_precision are of eager and compile.
        say: called with a line now and then.

    Raises:
        UsageError: an unknown runtime, an unknown value of `compute` or `budget`, or a dense model that cannot be compared.
        SparsifyError: not a sparse model; a runtime that was named and lacks a package or cannot run one of the models.
    """
    chosen, left_out = _chosen(runtimes, compute)
    check_sparse(model)
    if dense is not None:
        graft.check_original(dense, model)
    elif not backbone_changed:
        dense = graft.dense_twin(model)
    image = macs.image_shape(model)
    images = torch.randn(compute.batch_size or 1, *image, generator=torch.Generator().manual_seed(0))  # (B, C, H, W)
    runs: dict[Way, Run] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: of programs that are still open
        request = Request(images, compute, backbone_changed, Path(folder))
        for runtime in chosen:
            say(f"preparing {runtime.name}")
            for which, each in ((DENSE, dense), (CONVERTED, model)):
                if each is None:
                    continue
                try:
                    runs |= _ready(runtime, each, which, request)
                except SparsifyError as error:
                    if ALL not in runtimes:
                        raise
                    left_out[f"{runtime.name}, {which},"] = as_arguments(one_line(error))
        if not runs:
            raise SparsifyError(next(iter(left_out.values())))
        notes = [] if dense is None else _apart(dense, images, runs)
        say("measuring")
        ms = _timed(runs, budget, compute.torch_device)
    named = {runtime.name.removesuffix("-int8") for runtime in chosen}
    versions = {package: metadata.version(package) for r in chosen for package in r.packages if package in named}
    known = {"batch_size": len(images), "img_size": list(image[1:]), "runs": len(next(iter(ms.values())))}
    circumstances = conditions(AGAINST, compute, **known) | {"versions": versions}
    return Against(compare(ms), left_out, tuple(notes), circumstances)


def _chosen(names: Sequence[str], compute: Compute) -> tuple[list[Runtime], dict[str, str]]:
    """The runtimes that were asked for and can run here, and of `all` the others with the reason."""
    for name in names:
        if name not in (*RUNTIMES, ALL):
            raise UsageError(f"runtime {name}: expected one of {', '.join((*RUNTIMES, ALL))}")
    _ = compute.torch_device, compute.torch_dtype  # refuses what is unknown
    if ALL not in names:
        found = [RUNTIMES[name] for name in dict.fromkeys(names)]
        for runtime in found:
            runtime.check(compute)
        return found, {}
    found, left_out = [], {}
    for name, runtime in RUNTIMES.items():
        if runtime.int8 and compute.dtype == "float32":
            continue
        try:
            runtime.check(compute)
            found.append(runtime)
        except SparsifyError as error:
            left_out[name] = as_arguments(one_line(error))
    return found, left_out


def _ready(runtime: Runtime, model: nn.Module, which: str, request: Request) -> dict[Way, Run]:
    """The forms of a model in a runtime, each after one run: compiled, its decisions made.

    Raises:
        SparsifyError: none of them can run.
    """
    found: dict[Way, Run] = {}
    failed: SparsifyError | None = None
    for form, each in runtime.forms(model, request.backbone_changed).items():
        try:
            run = runtime.prepare(each, f"{which}-{form}", request)
            _answers(run)
            found[Way(runtime.name, which, form)] = run
        except Exception as error:
            failed = SparsifyError(f"{runtime.name} cannot run the {which} model: {one_line(error)}")
    if failed is not None and not found:
        raise failed
    return found


def _timed(runs: Mapping[Way, Run], budget: latency.Budget, device: torch.device) -> dict[Way, list[float]]:
    """All of them in one interleaved run: ms by round."""
    calls = {" ".join(way): run for way, run in runs.items()}
    ms = latency.by_round(calls, rounds=budget.rounds, budget_s=budget.seconds, device=device)
    return {way: ms[" ".join(way)] for way in runs}


def _answers(run: Run) -> Tensor:
    """What a run gives, [B, *], float32 on the CPU."""
    with torch.inference_mode():
        return run().to(CPU, torch.float32)


def _apart(dense: nn.Module, images: Tensor, runs: Mapping[Way, Run]) -> list[str]:
    """A line for each runtime in which the dense model's answers are not those of eager float32."""
    expected, lines = _answers(partial(macs.replica(dense, CPU, torch.float32), images)), []
    for way, run in runs.items():
        apart = float((_answers(run) - expected).norm() / expected.norm()) if way.model == DENSE else 0.0
        if not apart <= APART:
            said = f"dense in {way.runtime} answers otherwise than in eager float32, by {apart:.0%}"
            lines.append(f"{said}: do not trust its time")
    return lines
