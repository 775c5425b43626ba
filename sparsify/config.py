"""What a sparse model is (`SparsityConfig`) and what a schedule is chosen for (`Target`).

Frozen pydantic models that refuse unknown keys, so a typing error in a recipe is an error and not a default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from numbers import Integral
from operator import mul
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sparsify.errors import UsageError, brief, field, short

M = TypeVar("M", bound=BaseModel)
_NAME = re.compile("(?!(?:float|int)$)[a-z][a-z0-9_]*")  # of a field


def _whole(value: Any) -> Any:
    """A whole number of another type (numpy's, 3.0) as an int; anything else as it is."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if whole or (isinstance(value, float) and value.is_integer()) else value


Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]  # strict: not from a boolean, and not from text
Number = Annotated[float, Field(strict=True)]
PositiveShare = Annotated[Number, Field(gt=0, le=1)]
Keep = PositiveShare | Literal["dense"]
Share = Annotated[Number, Field(ge=0, le=1)]
NonNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1, le=10**9)]
Rank = Annotated[Whole, Field(ge=1, le=1024)]
Side = Annotated[Whole, Field(ge=1, le=64)]


Cells = tuple[Side, Side]


class Frozen(BaseModel):
    """Values that do not change; unknown fields are refused, and so are NaN and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def renamed(cls, tree: Any) -> Any:
        """`tree` with today's names for fields that had another one."""
        return tree

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tree: Any) -> Any:
        """`tree`; an error that names the field that does not exist, and the nearest ones, if it has one."""
        tree = cls.renamed(tree)
        for name in tree if isinstance(tree, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(unknown(name, cls.model_fields))
        return tree


def unknown(name: Any, known: Iterable[str], kind: str = "field") -> str:
    """What is said of a field that does not exist: the nearest one, or all that do."""
    near = difflib.get_close_matches(str(name)[:80], known := list(known), n=1)
    return f"unknown {kind} {brief(name)}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


_PLAIN = {  # pydantic's names of errors
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "int_type": "a whole number",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
    "missing": "one more value",
    "model_type": "fields with values",
    "string_type": "text",
    "too_long": "{max_length} values",
    "tuple_type": "a list",
}


def validate(model: type[M], tree: Any, source: str | Callable[[str], str]) -> M:
    """`model` built from `tree`, or a `UsageError` that says where `tree` comes from and the innermost thing wrong in it.

    `source` stands before the path of the field, or is called with it for what is to stand there instead.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        found = [(_path(each["loc"]), each) for each in error.errors(include_url=False)]
    path = max((path for path, _ in found), key=len)  # of a union the branch that got furthest
    here = [each for place, each in found if place == path]
    plain = list(dict.fromkeys(_PLAIN[e["type"]].format(**e.get("ctx", {})) for e in here if e["type"] in _PLAIN))
    ways = " or ".join(filter(None, (", ".join(plain[:-1]), *plain[-1:])))
    message = f"expected {ways}" if plain else here[0]["msg"].removeprefix("Value error, ")
    given = "" if isinstance(here[0]["input"], dict | BaseModel) else f" (given: {brief(here[0]['input'])})"
    where = ".".join(path)
    where = source(where) if callable(source) else f"{source} {where}"
    raise UsageError(f"{where.rstrip(' :')}: {message}{given}")


def _path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Names and indices of a field's place; pydantic also names the branches of unions."""
    return tuple(str(part) for part in location if isinstance(part, int) or _NAME.fullmatch(part))


class TokenLowrank(Frozen):
    """Options of the paper's predictor besides its rank (names as in `docs/glossary.md`)."""

    channels: Count | None = None
    """c: size of q' and k' inside a head; null: that of the head (the paper's figure)"""
    scale: Literal["head-size", "heads"] = "head-size"
    """q' K_down' is scaled by 1/sqrt of it; authors' code: heads"""
    coef_topk: Count | None = 8
    """coefficients kept in each row; null keeps all"""
    coef_threshold: NonNegative | None = None
    """coefficients up to this value become 0; used when coef_topk is null"""
    basis: Literal["signed", "absolute"] = "signed"
    """W_up as fitted, or its absolute value"""
    basis_threshold: NonNegative = 0.0
    """entries of W_up up to this value become 0"""
    shared_projection: bool = False
    """W_up is the transpose of W_down (SHARE_INOUT_PROJ)"""
    shared_heads: bool = False
    """one W_up for all heads, as in the authors' code"""


class Tokens(Frozen):
    """How tokens are removed: stages between attention and MLP of some blocks (`docs/glossary.md`, token keep).

    A number `keep` is the fraction of patch tokens kept at each of `stages`: of n patches ceil(keep^i n) remain after the
    i-th stage. A list has a rate for each block (1: no stage); ceil(n times the product of the rates so far) remain.
    """

    way: Literal["merge", "evit", "evit-fused"] = "merge"
    """merge: similar tokens become one; evit: the least important are dropped; evit-fused: fused into one"""
    importance: Literal["fitted", "attention"] = "fitted"
    """of a token; fitted: how much later rows read of it, predicted from the token by a linear map fitted in
    calibration; attention: what this block's cls row gives it"""
    keep: PositiveShare | tuple[Share, ...] = 0.7
    """fraction of patch tokens kept at each stage; a list: rate of each block, 1 for no stage"""
    stages: tuple[Count, ...] | None = None
    """blocks, counted from 1; null: three, a quarter, half and three quarters through (4, 7, 10 of 12)"""

    def with_stages(self, depth: int) -> Tokens:
        """A copy with the `stages` for that depth filled in, if there are none."""
        by_depth = sorted({depth * i // 4 + 1 for i in (1, 2, 3)})
        return self if self.stages is not None else self.model_copy(update={"stages": tuple(by_depth)})

    def shares(self, depth: int) -> tuple[float | None, ...]:
        """Fraction of the patches that remain after each block's stage; None where a block has none."""
        if isinstance(self.keep, tuple):
            products = accumulate(self.keep, mul)
            return tuple(None if rate == 1 else share for rate, share in zip(self.keep, products, strict=True))
        stages, keep = sorted(self.with_stages(depth).stages or ()), self.keep
        return tuple(keep ** (1 + stages.index(i)) if i in stages else None for i in range(1, depth + 1))

    def check(self, depth: int, prefix: int) -> None:
        """Raise `UsageError` where this does not fit `depth` blocks and `prefix` prefix tokens."""
        if not isinstance(self.keep, tuple):
            stages = self.with_stages(depth).stages or ()
            if not stages or max(stages) > depth or len(set(stages)) < len(stages):
                given = ",".join(map(str, stages)) or "()"
                raise UsageError(f"token stages {short(given, 80)}: expected different blocks from 1 to {depth}")
        elif len(self.keep) != depth:
            raise UsageError(
                f"token keep lists {len(self.keep)} rates, but the model has {depth} blocks: give one each"
            )
        elif 0 in self.keep and prefix == 0:
            raise UsageError("token keep 0 leaves nothing: this model has no cls or other prefix token")


class Geometry(NamedTuple):
    """What a configuration needs to know of a model (`SparsityConfig.resolved`)."""

    depth: int  # blocks
    heads: int  # H, of every block
    head_dim: int  # d, the smallest of all blocks
    tokens: int  # N, prefix tokens included, at the model's own image size
    prefix: int  # P, leading tokens that attend densely


class BlockPlan(NamedTuple):
    """A configuration resolved for one block. Keeps and cells are of each head, or one for all heads."""

    keeps: tuple[float, ...] | None  # fraction of keys that each patch query attends to; None: dense attention
    ranks: tuple[int, ...]  # r of each head
    cells: tuple[tuple[int, int], ...]  # rows and columns of the tail's grid of cells


def listed(value: Any) -> tuple[Any, ...]:
    """Values of each block, or one for all, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def plainest(values: Sequence[Any]) -> Any:
    """Values of each block as a configuration has them: one for all blocks where they are the same."""
    return values[0] if len(set(values)) == 1 and not _by_head(values[0]) else tuple(values)


def _by_head(value: Any) -> bool:
    """Whether a value of a block lists one for each head."""
    return isinstance(value, tuple) and not isinstance(value[0], int)


def growth(tokens: int) -> float:
    """What the number of cells is a fraction of: N up to 197 tokens, sqrt(197 N) beyond."""
    return min(tokens, (197 * tokens) ** 0.5)


def grid_of(cells: float) -> tuple[int, int]:
    """Rows and columns of the grid with the number of cells nearest to `cells`, square or with one row more."""
    best = (1, 1)
    for grid in [(side + extra, side) for side in range(1, 64) for extra in (0, 1)]:
        if abs(grid[0] * grid[1] - cells) < abs(best[0] * best[1] - cells):  # torch.compile traces no `min` by a key
            best = grid
    return best


class SparsityConfig(Frozen):
    """A sparse attention: predictor, budget and tail.

    `keep` is the fraction of all N keys that each patch query attends to, 0 < keep <= 1; the budget is
    b = ceil(keep N - 1e-9) of the N remaining tokens. A list gives one value for each block, or a list of one for each of
    its heads; `dense` leaves the attention of a block as it is.

    With `spread`, what a calibration fits costs as many MACs as `keep`, `rank` and `cells` would everywhere, but is spent
    over the heads where it matters most; values that are lists of each head stay as they are, and so does keep 1.
    """

    predictor: Literal["head-lowrank", "token-lowrank"] = "head-lowrank"
    """what scores the keys: a projection of q and k inside each head, or the paper's predictor"""
    keep: Keep | tuple[Keep | tuple[PositiveShare, ...], ...] = 0.1
    """fraction of keys that each patch query attends to; one, or by block, or by block and head"""
    rank: Rank | tuple[Rank, ...] | tuple[tuple[Rank, ...], ...] = 16
    """r: coordinates of the head (head-lowrank) or rows of W_down; one, or by block, or by block and head"""
    tail: Literal["none", "mean", "cells", "clusters"] = "clusters"
    """what represents the dropped keys of a row: nothing (the paper), their mean, or the means of cells or clusters"""
    cells: Cells | tuple[Cells | tuple[Cells, ...], ...] | None = None
    """rows and columns of the grid of cells; one grid, or by block, or by block and head; null: by N and keep"""
    spread: Literal["none", "rank", "all"] = "all"
    """what head-lowrank spends over the heads: nothing, ranks, or ranks, keep and cells"""
    granularity: Literal["token", "tile"] = "token"
    """a set of keys for each query, or one for each tile of queries"""
    tile: tuple[Side, Side] = (4, 4)
    """rows and columns of a tile of queries"""
    fold: bool = True
    """fold head-lowrank into qkv where that is exact"""
    token_lowrank: TokenLowrank = TokenLowrank()
    """options of token-lowrank"""
    tokens: Tokens | None = None
    """removal of tokens; null keeps all"""

    @classmethod
    def renamed(cls, tree: Any) -> Any:
        """`tree` with `spread` for `spread_rank`, which the first files and recipes have."""
        if not isinstance(tree, dict) or not isinstance(tree.get("spread_rank"), bool):
            return tree
        rest = {name: value for name, value in tree.items() if name != "spread_rank"}
        return {"spread": "rank" if tree["spread_rank"] else "none"} | rest

    def keeps_of(self, block: int) -> tuple[float, ...] | None:
        """Keep fractions of block `block` (counted from 0), of each head or one for all; None: dense."""
        keep = self.keep[block] if isinstance(self.keep, tuple) else self.keep
        if keep == "dense":
            return None
        return keep if isinstance(keep, tuple) else (float(keep),)

    def keep_of(self, block: int) -> float | None:
        """Keep fraction of block `block` (counted from 0), the mean over its heads; None: dense."""
        keeps = self.keeps_of(block)
        return None if keeps is None else sum(keeps) / len(keeps)

    def ranks_of(self, block: int, heads: int) -> tuple[int, ...]:
        """Rank of each head of block `block` (counted from 0)."""
        rank = self.rank[block] if isinstance(self.rank, tuple) else self.rank
        return rank if isinstance(rank, tuple) else (rank,) * heads

    def cells_of(self, block: int) -> tuple[tuple[int, int], ...]:
        """Grids of cells of block `block` (counted from 0), of each head or one for all, of a configuration that
        `with_cells` gave."""
        assert self.cells is not None
        cells: Any = self.cells if isinstance(self.cells[0], int) else self.cells[block]
        return (cells,) if isinstance(cells[0], int) else cells

    def with_cells(self, tokens: int) -> SparsityConfig:
        """A copy with `cells` filled in for N = `tokens`, by block where `keep` differs. A file says them.

        Their number is the nearest to min(1/6, max(0.6 keep, 0.1 - 0.4 keep)) `growth(N)` that a grid has: of 197 tokens
        4x4 at keep 0.05, 4x3 at 0.1, 6x5 at 0.25; of 577 tokens 5x4 at 0.1. A cell costs a row about as much as 1.4 kept
        keys: from keep 0.1 on, cells and kept keys share the cost; below it the tail carries most of the mass and needs
        more cells. Larger grids need more cells for the same error, but not in proportion.
        """
        if self.cells is not None:
            return self

        def grid(keep: Any) -> Any:
            if isinstance(keep, tuple):
                return tuple(grid(each) for each in keep)
            share = 1.0 if keep == "dense" else keep
            return grid_of(min(1 / 6, max(0.6 * share, 0.1 - 0.4 * share)) * growth(tokens))

        return self.model_copy(update={"cells": plainest([grid(keep) for keep in listed(self.keep)])})

    def with_plans(self, plans: Sequence[BlockPlan]) -> SparsityConfig:
        """A copy in which each block has its plan."""
        keeps = tuple("dense" if p.keeps is None else p.keeps[0] if len(p.keeps) == 1 else p.keeps for p in plans)
        cells = tuple(p.cells[0] if len(p.cells) == 1 else p.cells for p in plans)
        ranks = [p.ranks for p in plans]
        rank = ranks[0][0] if len({rank for each in ranks for rank in each}) == 1 else tuple(ranks)
        return self.model_copy(update={"keep": keeps, "rank": rank, "cells": plainest(cells)})

    def resolved(self, shape: Geometry) -> tuple[BlockPlan, ...]:
        """The plan of each block of a model of that shape; `UsageError` where it does not fit."""
        self._check(shape)
        full, heads = self.with_cells(shape.tokens), shape.heads
        return tuple(BlockPlan(full.keeps_of(i), full.ranks_of(i, heads), full.cells_of(i)) for i in range(shape.depth))

    def _check(self, shape: Geometry) -> None:
        depth, heads, head_dim, _, prefix = shape
        if self.tokens is not None:
            self.tokens.check(depth, prefix)
        one_grid = self.cells is not None and isinstance(self.cells[0], int)
        for name in ("keep", "rank") if one_grid else ("keep", "rank", "cells"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != depth:
                raise UsageError(f"{name} lists {len(value)} values, but the model has {depth} blocks: give one each")
        sparse = [i for i in range(depth) if self.keep_of(i) is not None]
        if not sparse:
            return
        ranks = [self.ranks_of(i, heads) for i in sparse]
        by_head: dict[str, list[Sequence[Any]]] = {
            "rank": list(ranks),
            "keep": [self.keeps_of(i) or () for i in sparse],
        }
        if self.cells is not None:
            by_head["cells"] = [self.cells_of(i) for i in sparse]
        for name, values in by_head.items():
            for value in values:
                if len(value) != heads and (name == "rank" or len(value) != 1):
                    many = f"{name} lists {len(value)} values for a block"
                    raise UsageError(f"{many}, but it has {heads} heads: give one each")
        if self.predictor == "token-lowrank" and any(len(set(r)) > 1 for r in ranks):
            raise UsageError("token-lowrank has one rank for all heads of a block")
        largest = max(map(max, ranks))
        if self.predictor == "head-lowrank" and largest > head_dim:
            smaller = f"give a smaller {field('rank')}"
            raise UsageError(f"rank {largest} is larger than the head size {head_dim} of this model: {smaller}")


class Target(Frozen):
    """What schedules are chosen for, one for each of `shares`: fractions of the dense model's MACs or time.

    The first is the one that a file has in use. `keeps` are the fractions of keys that a block may have, null for dense;
    `batch_size` is that of the timing. `overhead` is the time of a round that removes tokens besides its MACs, as a
    fraction of the dense model's: it prefers fewer, larger rounds where MACs alone do not tell what a round takes.
    """

    of: Literal["macs", "latency"]
    shares: tuple[PositiveShare, ...] = Field(min_length=1, max_length=16)
    keeps: tuple[PositiveShare | None, ...] = (None, 0.4, 0.25, 0.1, 0.03)
    batch_size: Count = 1
    overhead: Annotated[float, Field(ge=0, le=1)] = 0.0


_PROGRAM = {"keeps": (None,), "overhead": 0.01}
RUNTIMES: Mapping[str, Mapping[str, Any]] = {"eager": {}, "compile": {}, "onnxruntime": _PROGRAM, "openvino": _PROGRAM}
"""Where a converted model is to run, and what of `Target` pays there. Plain operators of sparse attention are slower than a
program's dense attention, so a budget is spent on fewer tokens alone; a round of removing tokens takes 1.5 to 5 % of a
dense DeiT-S at batch 1, less of larger batches and models (docs/export.md)."""


def target(macs: Any, latency: Any, keeps: Any = None, runtime: str = "eager") -> Target | None:
    """The `Target` of a caller's arguments, a fraction or several; None where neither is given.

    Args:
        keeps: to choose from; None: those that pay in `runtime`, one of `RUNTIMES`.

    Raises:
        UsageError: both are given, a value is out of range, an unknown runtime, or one in which nothing is timed or saved.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime {runtime}: expected one of {', '.join(RUNTIMES)}")
    if RUNTIMES[runtime] and macs is None:
        times = "" if latency is None else ", as times are measured in eager mode"
        raise UsageError(f"runtime {runtime}: fewer tokens are what pays there; give {field('target_macs')}{times}")
    if macs is None and latency is None:
        return None
    if macs is not None and latency is not None:
        raise UsageError(f"give either {field('target_macs')} or {field('target_latency')}")
    of, given = ("latency", latency) if macs is None else ("macs", macs)
    several = isinstance(given, Iterable) and not isinstance(given, str)
    shares = tuple(dict.fromkeys(given)) if several else (given,)
    tree = {"of": of, "shares": shares, **RUNTIMES[runtime]} | ({} if keeps is None else {"keeps": keeps})
    return validate(Target, tree, lambda path: field("keep" if path.startswith("keeps") else f"target_{of}"))
