"""Every figure that a GPU can settle, in one script of at most eight minutes: predicted beside measured.

    python benchmarks/gpu.py [--items dense,tiles] [--seconds 480] [--json FILE] [--markdown FILE]

    ceilings   memory and tensor cores
    check      the kernels against PyTorch on this GPU, twice with the same bits
    dense      PyTorch's attention kernels, with and without sizes of keys
    tiles      sparse attention in tiles of queries (gpu_tiles.py, a prototype): decides whether it becomes an op
    merging    a round of merging tokens: PyTorch and Triton, eager and from a CUDA graph
    models     whole models in bfloat16, dense beside fewer tokens, eager and from CUDA graphs

A line of JSON follows each measurement, so that an interrupted run has told what it found; tables come at the end. Times are
medians by CUDA events of graph replays, with three sets of inputs in turn. An item that cannot run here says why, and the
next one runs. `--toy` runs everything at tiny sizes on the CPU, for a test; with TRITON_INTERPRET=1 also the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gpu_predictions as predicted
import torch
from torch import Tensor

from sparsify.nn import merging
from sparsify.nn.tokens import ranking
from sparsify.ops import attention, timing
from sparsify.ops.devices import device_name, gpu_details
from sparsify.ops.selection import Context, Ranking
from sparsify.ops.spec import Spec, budget

Row = dict[str, Any]
READINGS = 7
SETS = 3  # of inputs: in turn, so that a call does not find its own in the cache
HEADS, HEAD = 6, 64  # of DeiT-S
PACKAGES = ("timm", "pydantic", "yaml", "safetensors", "huggingface_hub", "filelock")  # of whole models


@dataclass
class Run:
    """One run of the script."""

    device: torch.device
    toy: bool
    until: float  # `time.monotonic()`
    rows: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def card(self) -> str:
        return "" if self.toy else predicted.card(device_name(self.device))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.toy else torch.bfloat16

    def add(self, item: str, **row: Any) -> None:
        self.rows.setdefault(item, []).append(row)
        print(json.dumps({"item": item, **row}), flush=True)

    def late(self, seconds: float) -> bool:
        """Whether less than so many seconds are left."""
        return self.until - time.monotonic() < seconds

    def ms(self, call: Callable[[], object], calls: int = timing.GRAPHED, graph: bool = True) -> float:
        """Median time of a call: of replays of a graph of so many calls, or eager."""
        with torch.inference_mode():
            read = timing.stopwatch(call, self.device, calls if graph else 0)
            read()
            return statistics.median(read() for _ in range(1 if self.toy else READINGS))

    def heads(self, batch: int, N: int, d: int = HEAD) -> list[Tensor]:
        """Queries, keys and values [3, B, H, N, d] as a model's `qkv` lays them out; `SETS` of them."""
        shape = (batch, N, 3, 1 if self.toy else HEADS, d)
        return [torch.randn(shape, device=self.device).to(self.dtype).permute(2, 0, 3, 1, 4) for _ in range(SETS)]


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Makes one of the calls after the other."""
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(calls)
        return calls[state["next"]]()

    return call


def ps(ms: float, batch: int, heads: int, N: int) -> float:
    """Picoseconds for a query-key pair of a head."""
    return 1e9 * ms / (batch * heads * N * N)


def kernels() -> Any:
    """The package's ops for GPUs, tokens and attention; None where they are missing or cannot run."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("sparsify.ops.gpu") is None:
        return None
    from sparsify.ops.gpu import attention as sized
    from sparsify.ops.gpu import tokens

    return tokens, sized


# ---- items ----


def ceilings(run: Run) -> None:
    n, side = (1 << 12, 64) if run.toy else (1 << 28, 8192)
    source = torch.empty(n, device=run.device)
    target, a = torch.empty_like(source), torch.randn(side, side, device=run.device).to(run.dtype)
    memory, flops = predicted.PEAK.get(run.card, (None, None))
    copied = run.ms(lambda: target.copy_(source), 1)
    run.add("ceilings", what="copy, GB/s", stated=memory, measured=2 * source.nbytes / copied / 1e6)
    product = run.ms(lambda: a @ a, 1)
    run.add("ceilings", what="product, TFLOP/s", stated=flops, measured=2 * side**3 / product / 1e9)


def check(run: Run) -> None:
    import gpu_tiles as tiles

    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are filled with NaN
    try:
        _check(run, tiles)
    finally:
        torch.use_deterministic_algorithms(False)


def _check(run: Run, tiles: Any) -> None:

    shapes = [((8, 9), 1, 0.3)] if run.toy else [((14, 14), 1, 0.25), ((37, 37), 1, 0.15), ((20, 33), 4, 1.0)]
    for grid, prefix, keep in shapes:
        N = prefix + grid[0] * grid[1]
        q, k, v = run.heads(1, N)[0].float().unbind(0)
        s = tiles.Settings(16, budget(keep, N), prefix, grid, (4, 4), exact=True)
        found = tiles.attention(q, k, v, HEAD**-0.5, s)
        spec = Spec.uniform(s.budget, prefix, "clusters", grid, (4, 4), (8, 8), HEAD**-0.5)
        by = Ranking(None, None, None, None, 0.0, (16,) * q.shape[1])
        expected = attention.attention(q, k, v, by, Context(), spec, "reference")
        call = partial(tiles.attention, q, k, v, HEAD**-0.5, s)
        compared(run, f"tiles, {N} tokens", call, found, expected, 1e-3)
    if kernels() is None:
        raise LookupError("the kernels for tokens are not there")
    tokens, sized = kernels()
    for n, m in [(20, 14)] if run.toy else [(196, 138), (1369, 959)]:
        x, I = torch.randn(4, n, 64, device=run.device), torch.rand(4, n, device=run.device)
        call = partial(tokens.merge_tokens, x, I, None, None, 0, m, merging.candidates(n, m))
        merged, *_, group = call()
        moved = float((group != merging.matching(x, I, m)[1]).float().mean())  # products differ in their last bits
        right = compared(run, f"merging {n} to {m}", call, merged, merging.weighted_mean(x, I, group, m))
        run.add("check", what=f"groups of {n} to {m}", error=moved, right=right and moved < 0.01)
        call = partial(tokens.choose_tokens, x, I, None, 0, m, True)
        chosen, _, group = call()
        same = torch.equal(group, ranking(I, m, True)[1])
        right = compared(run, f"evit-fused, {n} to {m}", call, chosen, merging.weighted_mean(x, I, group, m + 1))
        run.add("check", what=f"groups of evit, {n} to {m}", error=0.0 if same else 1.0, right=right and same)
        q, k, v = (t.contiguous() for t in run.heads(1, n)[0].unbind(0))
        size, scale = 1 + torch.rand(1, n, device=run.device), HEAD**-0.5
        call = partial(sized.sized_attention, q, k, v, size, scale)
        exact = attention.dense("sdpa", q.float(), k.float(), v.float(), None, scale, "input", size)
        compared(run, f"attention with sizes, {n} tokens", call, call(), exact, 2e-2)


def compared(run: Run, what: str, call: Callable[[], Any], found: Tensor, expected: Tensor, most: float = 1e-4) -> bool:
    """Notes the error of a result, and whether a second call gives the same bits."""
    again = call()
    first, second = (call(), again) if isinstance(again, tuple) else ((call(),), (again,))
    same = all(map(torch.equal, first, second))
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    run.add("check", what=what, error=error, twice_the_same=same, right=error < most and same)
    return error < most and same


def dense(run: Run) -> None:
    for N in (17,) if run.toy else (197, 577, 1025, 1370, 4097):
        for tokens in (34,) if run.toy else (16384, 65536):
            best(run, max(1, tokens // N), N)


def best(run: Run, batch: int, N: int) -> float:
    """The fastest dense kernel of a shape, ms; every kernel's time is noted."""
    sets, times = run.heads(batch, N), {}
    size = 1 + torch.rand(batch, N, device=run.device)
    expected = predicted.DENSE.get(run.card, {}).get(N, (None, None))
    paths = ("sdpa", *(() if run.toy else attention.SDPA))
    sized = kernels()
    forms = [(path, None) for path in paths] + [(path, size) for path in paths]
    for path, sizes in forms:
        calls = [partial(attention.dense, path, *x.unbind(0), None, HEAD**-0.5, "input", sizes) for x in sets]
        add(run, batch, N, path, sizes is not None, in_turn(calls), expected, times)
    if sized is not None:
        calls = [partial(sized[1].sized_attention, *x.unbind(0), size, HEAD**-0.5) for x in sets]
        add(run, batch, N, "triton", True, in_turn(calls), expected, times)
    return min(ms for (_, with_sizes), ms in times.items() if not with_sizes)


def add(run: Run, batch: int, N: int, path: str, sizes: bool, call: Any, expected: Any, times: Any) -> None:
    """Times a dense kernel, if it takes the shape."""
    try:
        ms = times[path, sizes] = run.ms(call)
    except RuntimeError as error:
        run.add("dense", tokens=N, batch=batch, path=path, sizes=sizes, error=str(error).splitlines()[0][:80])
        return
    foreseen = None if sizes else {"sdpa-flash": expected[0]}.get(path, expected[1])
    pair = ps(ms, batch, 1 if run.toy else HEADS, N)
    run.add("dense", tokens=N, batch=batch, path=path, sizes=sizes, ms=ms, predicted_ps=foreseen, ps=pair)


def tiles(run: Run) -> None:
    import gpu_tiles as tiles

    forms = [(0.25, (8, 8), 32, False), (0.25, (8, 8), 16, False), (0.25, (8, 8), 16, True)]
    forms += [(0.15, (8, 8), 16, False), (0.25, (8, 16), 16, False)]
    for side in (4,) if run.toy else (14, 37, 64, 24, 32):
        N = 1 + side * side
        batch = 1 if run.toy else max(1, 32768 // N)
        reference = best(run, batch, N)
        q, k, v = run.heads(batch, N)[0].unbind(0)
        for number, (keep, tile, bits, quads) in enumerate(forms[:1] if run.toy else forms):
            s = tiles.Settings(16, budget(keep, N), 1, (side, side), (8, 8), tile, bits, quads)
            made = tiles.prepare(k, v, s)
            pooled = tiles.score(q, k, made, s)
            chosen = tiles.choose(pooled, made, s)
            parts: dict[str, Callable[[], object]] = {
                "prepare": partial(tiles.prepare, k, v, s),
                "score": partial(tiles.score, q, k, made, s),
                "choose": partial(tiles.choose, pooled, made, s),
                "attend": partial(tiles.attend, q, k, v, HEAD**-0.5, made, chosen, s),
            }
            times = {name: run.ms(call, 5) for name, call in parts.items()}
            heads = q.shape[1]
            found = {f"{name}_ps": ps(ms, batch, heads, N) for name, ms in times.items()}
            expected = predicted.TILES.get(run.card, {}).get(N, (None,) * 3)
            run.add(
                "tiles",
                tokens=N,
                keep=keep,
                rows=tile[0] * tile[1],
                bits=bits,
                quads=quads,
                **found,
                predicted=expected[number] if number < 3 else None,
                faster_than_dense=reference / sum(times.values()),
                bar=predicted.TILES_BAR,
            )
            if run.late(10):
                return


def merge(run: Run) -> None:
    ops = kernels()
    for n, width in ((20, 32),) if run.toy else ((196, 384), (1369, 384)):
        m, x0 = round(0.7 * n), torch.randn(n, width, device=run.device).to(run.dtype)
        for batch in (1,) if run.toy else (1, 8, 64, 256):
            if batch * n > 100_000:
                continue
            x, I = (
                x0 + torch.randn(batch, n, width, device=run.device).to(run.dtype),
                torch.rand(batch, n).to(run.device),
            )

            def by_torch(x: Tensor = x, I: Tensor = I, m: int = m) -> None:
                _, group = merging.matching(x, I, m)
                merging.weighted_mean(x, I, group, m)
                merging.effective_size(torch.ones_like(I), I, group, m)
                merging.group_sums(I, group, m)

            forms: list[tuple[str, Callable[[], object], bool]] = [("torch", by_torch, False)]
            forms += [] if run.toy else [("torch", by_torch, True)]
            if ops is not None:
                call = partial(ops[0].merge_tokens, x, I, None, None, 0, m, merging.candidates(n, m))
                forms += [("triton", call, False)] + ([] if run.toy else [("triton", call, True)])
            for name, call, graph in forms:
                run.add("merging", n=n, m=m, batch=batch, by=name, graph=graph, ms=run.ms(call, 5, graph))


def models(run: Run) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LookupError(f"whole models need {', '.join(missing)}")
    from gpu_models import CASES, TOYS, timed

    for case in TOYS if run.toy else CASES:
        if run.late(15):
            raise LookupError("no time is left for the other models")
        for row in timed(case, run):
            run.add("models", **row)


ITEMS: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings, "check": check, "dense": dense, "tiles": tiles, "merging": merge, "models": models
}  # fmt: skip
SHARES = {"ceilings": 15, "check": 60, "dense": 60, "tiles": 90, "merging": 45, "models": 150}  # seconds, about


def verdicts(run: Run) -> Iterator[Row]:
    """What was to be shown, and whether it was."""
    for row in run.rows.get("models", []):
        if row.get("bar") is not None:
            yield {"what": f"{row['model']}, batch {row['batch']}, {row['form']}", **_judged(row, "faster_than_dense")}
    found = [row for row in run.rows.get("tiles", []) if row["tokens"] > 1000]
    if found:
        first = max(found, key=lambda row: row["faster_than_dense"])
        what = f"tiles at {first['tokens']} tokens, the best form"
        yield {"what": what, **_judged(first, "faster_than_dense")}


def _judged(row: Row, name: str) -> Row:
    measured, bar = row[name], row["bar"]
    return {"predicted": row.get("predicted"), "measured": measured, "bar": bar, "reached": measured >= bar}


def table(title: str, rows: list[Row]) -> str:
    """Rows as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"## {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in map(row.get, names)]
        lines.append("| " + " | ".join("" if cell == "None" else cell for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default=",".join(ITEMS), help="which, in this order")
    parser.add_argument("--seconds", type=float, default=480, help="after which no further item begins (480)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():
        raise SystemExit("no GPU is here: --toy runs everything at tiny sizes on the CPU")
    chosen = arguments.items.split(",")
    if unknown := set(chosen) - ITEMS.keys():
        raise SystemExit(f"items {','.join(sorted(unknown))}: expected some of {','.join(ITEMS)}")
    torch.manual_seed(0)
    device = torch.device("cpu" if arguments.toy else "cuda")
    run = Run(device, arguments.toy, time.monotonic() + arguments.seconds)
    known = {
        "device": device_name(device),
        "details": gpu_details(device),
        "torch": torch.__version__,
        "card": run.card,
    }
    print(json.dumps(known), flush=True)
    for name in chosen:
        begin = time.monotonic()
        if run.late(min(SHARES[name] / 3, arguments.seconds / 10)):
            run.add("left out", what=name, why="no time is left")
            continue
        try:
            ITEMS[name](run)
        except Exception as error:  # the others still run
            run.add("left out", what=name, why=f"{type(error).__name__}: {error}"[:300])
        print(json.dumps({"item": name, "seconds": round(time.monotonic() - begin, 1)}), flush=True)
    found = list(verdicts(run))
    text = "\n".join(table(title, rows) for title, rows in {**run.rows, "verdicts": found}.items() if rows)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(f"# GPU: {known['device']}\n\n{known['details']}\n\n{text}", encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**known, "rows": run.rows, "verdicts": found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
