"""Text below the pictures of `show` and `report`, where layers and heads are counted from 1."""

from __future__ import annotations

from sparsify.measure.inspection import OWN, Inspection, Layer, Shown, Survivors

NOT_COMPUTED = "patch rows are not computed here: only the prefix tokens go on"
GONE = "the query's patch has left"


def percent(share: float) -> str:
    """0.0312 -> '3.1 %', 0.31 -> '31 %', 0.0004 -> '0.04 %'; the space does not break."""
    value = 100 * share
    if value >= 9.95:
        return f"{value:.0f}\u00a0%"
    return f"{value:.1f}\u00a0%" if value >= 0.095 or value == 0 else f"{value:.2f}\u00a0%"


def layer(layer: Layer | None) -> str:
    """Tokens and budgets of a layer: '197 tokens, 4 to 39 keys a query'."""
    if layer is None:
        return NOT_COMPUTED
    return f"{layer.tokens} tokens, " + (f"{budgets(layer)} keys a query" if layer.sparse else "dense: all keys")


def budgets(layer: Layer) -> str:
    """Keys that a query keeps, over all heads: '20' or '4 to 39'."""
    low, high = min(layer.budgets), max(layer.budgets)
    return str(low) if low == high else f"{low} to {high}"


def panel(inspection: Inspection, layer: Layer, head: int, query: int) -> str:
    """Attention to prefix tokens and tail, which have no patch: 'cls 3.1 %, tail 30 %'; '–' for prefix tokens not kept."""
    if layer.rows[query] < 0:
        return GONE
    parts = []
    for name in dict.fromkeys(inspection.prefix):
        at = [i for i, each in enumerate(inspection.prefix) if each == name]
        kept, weight = layer.kept[head, query, at], layer.weight[head, query, at]
        parts.append(f"{name}\u00a0{percent(float(weight.sum())) if bool(kept.any()) else '–'}")
    if float(layer.tail[head, query]) > 0:
        parts.append(f"tail\u00a0{percent(float(layer.tail[head, query]))}")
    return ", ".join(parts)


def where(shown: Shown, query: int) -> str:
    """A query in words: 'patch in row 7, column 5 of 14x14'."""
    rows, columns = shown.found.grid
    row, column = divmod(shown.found.queries[query], columns)
    return f"patch in row {row + 1}, column {column + 1} of {rows}x{columns}"


def stage(stage: Survivors) -> str:
    """'138 of 196 patch tokens'."""
    return f"{stage.after} of {stage.before} patch tokens" if stage.after else "only the prefix tokens go on"


def true_attention(reference: str) -> str:
    """Which attention the kept fraction refers to, in one line."""
    if reference == OWN:
        return "True attention: softmax of all q.k of the layer, inside the sparse model"
    return "True attention: that of the layer in the dense original"


def mass(inspection: Inspection) -> str:
    """The fraction of the true attention on the kept keys over all sparse layers, and the smallest, in one line."""
    sparse = [each for each in inspection.layers if each.sparse]
    if not sparse:
        return "No sparse attention: every key is kept"
    mean = sum(float(each.mass.mean()) for each in sparse) / len(sparse)
    best = sum(float(each.best.mean()) for each in sparse) / len(sparse)
    least = min(sparse, key=lambda each: float(each.mass.min()))
    return (
        f"The kept keys hold {100 * mean:.1f} % of the true attention; the best choice of as many keys would hold "
        f"{100 * best:.1f} %. Least: {100 * float(least.mass.min()):.1f} % in layer {least.block + 1}, head "
        f"{int(least.mass.argmin()) + 1}"
    )
