"""The figures of a profile and their keys in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import nn

from sparsify.errors import SparsifyError
from sparsify.measure.latency import Timing


class DenseMacs(NamedTuple):
    """MACs of a dense model, per image: the whole of it, and its MHSA."""

    macs: int
    mhsa_macs: int


class PaperMacs(TypedDict):
    """MHSA by the authors' accounting; None: no dense model."""

    mhsa_macs_dense: int | None
    mhsa_macs_sparse: int


_APART = {"measured", "choices", "paper"}  # fields with keys of their own, if any


@dataclass(frozen=True)
class Measured:
    """Times of `dense`, `sparse` and `auto` from one interleaved run; peak memory in bytes. None: no dense model."""

    dense: Timing | None
    sparse: Timing
    auto: Timing
    peak_memory_dense: int | None
    peak_memory_sparse: int


@dataclass(frozen=True)
class Profile:
    """Cost of a sparse model beside its dense original. MACs are per image, and theoretical.

    `as_dict` gives these keys, whole numbers unless stated otherwise; attributes are named as the keys, but latencies,
    throughputs and memory are in `measured` (None: nothing was measured). If the sparse model's weights were changed and
    no dense model was given, everything of the dense one (`..._dense`, `speedup_sparse`) is None.

    MACs (one multiply-accumulate counts once; sums, softmax, top-k and elementwise products count 0; norms by fvcore's
    estimate), counted by fvcore and by `analytic`, which must agree to the unit:

        macs_dense, macs_sparse             whole model
        mhsa_macs_dense, mhsa_macs_sparse   the paper's 'MHSA': attention of all blocks without its projections, as executed
                                            (sparse = kept_macs + prefix_macs + predictor_macs + tail_macs + full_macs)
        kept_macs                           logits and values of the kept keys
        prefix_macs                         rows of the prefix tokens, which attend densely
        predictor_macs                      scores that select the keys
        tail_macs                           cell means that stand for the dropped keys
        full_macs                           attention of dense blocks, over the remaining tokens
        stage_macs                          importance and matching of tokens at the stages; no part of MHSA
        tokens                              of each block a pair, prefix included: tokens into its attention, and into its
                                            MLP (of the sparse model; the dense one has as many everywhere)
        paper                               with count_as='paper' only: mhsa_macs_dense, mhsa_macs_sparse as Sparsifiner's
                                            authors count (`sparsify.measure.paper`): not what is executed, not checked
        unsupported                         mapping op -> occurrences: ops that fvcore could not count; best empty

        param_count, param_count_dense      parameters of the sparse and of the dense model

    Measured, absent if nothing was measured (floats):

        latency_ms_dense, latency_ms_sparse, latency_ms_auto          median per batch. sparse: the sparse form by
                                                                      `backend`, without dense fallback; auto: what
                                                                      `backend=auto` runs, dense attention where that was
                                                                      measured faster and `backbone_changed` is false
        latency_ms_{dense,sparse,auto}_p10, latency_ms_..._p90        spread of the same runs
        throughput_dense, throughput_sparse, throughput_auto          images per second at the median
        speedup_sparse                      latency_ms_dense / latency_ms_sparse, of the same interleaved run; below 1:
                                            slower than dense
        peak_memory_dense, peak_memory_sparse   bytes of the weights, the input and the peak of all other live tensors
        choices                             paths selected by `backend=auto`: list of blocks (numbers from 0), shape
                                            (what the decision is for: batch, heads, tokens, head_dim, dtype, ...), taken
                                            (cpu, reference (sparse), dense-cpu (our dense kernel) or sdpa), ms (path ->
                                            median of the attention call alone; empty if there was only one path), reason

    Conditions:

        backend                             what computed the sparse form: 'cpu (avx512)', 'reference', 'reference (why)';
                                            if nothing was measured, the requested name
        conditions                          mapping: img_size [height, width]; if something was measured, also batch_size,
                                            dtype, device, device_name, threads, runs, torch, timm, sparsify
        modules                             the tree, parents before children: list of name ('' is the model), depth,
                                            type and type_dense (class names; null: no such module there),
                                            params (of the sparse model), macs_dense, macs_sparse (all inclusive of
                                            children); attention modules: mhsa_macs_dense, mhsa_macs_sparse, kept_macs,
                                            prefix_macs, predictor_macs, tail_macs, full_macs
    """

    macs_dense: int | None
    macs_sparse: int
    mhsa_macs_dense: int | None
    mhsa_macs_sparse: int
    kept_macs: int
    prefix_macs: int
    predictor_macs: int
    tail_macs: int
    full_macs: int
    stage_macs: int
    tokens: tuple[tuple[int, int], ...]
    unsupported: Mapping[str, int]
    param_count: int
    param_count_dense: int | None
    measured: Measured | None
    backend: str
    conditions: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...]
    choices: tuple[Mapping[str, Any], ...] = ()
    paper: PaperMacs | None = None

    @property
    def dense(self) -> DenseMacs:
        """`macs_dense` and `mhsa_macs_dense`; raises `SparsifyError` if the profile has no dense model."""
        if self.macs_dense is None or self.mhsa_macs_dense is None:
            reason = "the weights are not the dense original's, which was not given"
            raise SparsifyError(f"this profile has no dense figures: {reason}")
        return DenseMacs(self.macs_dense, self.mhsa_macs_dense)

    @property
    def batch_size(self) -> int:
        """Images per measured batch."""
        return int(self.conditions.get("batch_size", 1))

    def as_dict(self) -> dict[str, Any]:
        """The documented keys, fit for JSON."""
        tree = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _APART}
        tree |= {name: dict(tree[name]) for name in ("unsupported", "conditions")}
        tree["tokens"] = [list(pair) for pair in self.tokens]
        if self.paper is not None:
            tree["paper"] = dict(self.paper)
        tree["modules"] = [dict(row) for row in self.modules]
        if self.measured is None:
            return tree
        m = self.measured
        for name, timing in (("dense", m.dense), ("sparse", m.sparse), ("auto", m.auto)):
            key = f"latency_ms_{name}"
            tree |= {
                key: timing and timing.median,
                f"{key}_p10": timing and timing.p10,
                f"{key}_p90": timing and timing.p90,
                f"throughput_{name}": timing and timing.throughput(self.batch_size),
            }
        tree["speedup_sparse"] = m.dense and m.dense.median / m.sparse.median
        tree["choices"] = [dict(each) for each in self.choices]
        tree["peak_memory_dense"], tree["peak_memory_sparse"] = m.peak_memory_dense, m.peak_memory_sparse
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Profile:
        """The profile with these keys of `as_dict`; `KeyError`, `TypeError` or `ValueError` if they are not a profile's."""
        figures = {name: tree[name] for name in cls.__dataclass_fields__.keys() - _APART - {"tokens", "modules"}}
        measured = None
        if tree.get("latency_ms_sparse") is not None:
            dense, sparse, auto = (_timing(tree, name) for name in ("dense", "sparse", "auto"))
            if sparse is None or auto is None:
                raise KeyError("latency_ms_auto")
            measured = Measured(dense, sparse, auto, tree["peak_memory_dense"], tree["peak_memory_sparse"])
        return cls(
            **figures,
            measured=measured,
            tokens=tuple((int(a), int(b)) for a, b in tree["tokens"]),
            modules=tuple(tree["modules"]),
            choices=tuple(tree.get("choices") or ()),
            paper=tree.get("paper"),
        )


def count_parameters(module: nn.Module) -> int:
    """What `param_count` says."""
    return sum(p.numel() for p in module.parameters())


def _timing(tree: Mapping[str, Any], name: str) -> Timing | None:
    median = tree[f"latency_ms_{name}"]
    if median is None:
        return None
    return Timing(median, tree[f"latency_ms_{name}_p10"], tree[f"latency_ms_{name}_p90"], tree["conditions"]["runs"])
