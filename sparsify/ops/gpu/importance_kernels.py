"""The importance of patch tokens in Triton; `sparsify.nn.importance` is the reference."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "P"])
def fitted(
    x, weights, size, out, n, P, least, C: tl.constexpr, CP: tl.constexpr, SIZED: tl.constexpr, ROWS: tl.constexpr
):
    """I_j = max(s_j e^(w . norm(x_j) + b), least) of each patch token.

    Grid: (n / ROWS, B).

    x [B, P + n, C]; weights, w and b, [C + 1]; size float32 [B, P + n] where SIZED; out float32 [B, n]. CP: C, padded.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    there, inside = token < n, c < C
    at = image * (P + n) + P + token
    rows = tl.load(x + at[:, None] * C + c[None], mask=there[:, None] & inside[None], other=0.0).to(tl.float32)
    w = tl.load(weights + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(weights + C).to(tl.float32)
    centred = tl.where(inside[None], rows - tl.sum(rows, 1)[:, None] / C, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + 1e-5)  # that of torch's layer norm
    score = tl.sum(centred * w[None], 1) * scale + b
    if SIZED:
        score += tl.log(tl.load(size + at, mask=there, other=1.0))
    tl.store(out + image * n + token, tl.maximum(tl.exp(score), least), mask=there)


@triton.jit(do_not_specialize=["N"])
def logits(
    q, k, size, out, lse, scale, q_image, q_head, q_row, k_image, k_head, k_row, N,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of the rows that rank the tokens, and the logarithm of the sum of their exponentials.

        z_j = q_i . k_j scale + log s_j

    Grid: (H * max(ROWS, 1), B), heads first: one program for each ranking row i.

    q, k [B, H, N, D] with strides, the last 1; size float32 [B, N] where SIZED; out float32 [B, H, max(ROWS, 1), N]; lse
    [B, H, max(ROWS, 1)]. ROWS 0: one row, the mean query. DP: D, padded.
    """
    r: tl.constexpr = ROWS if ROWS > 0 else 1
    program, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = program // r
    d = tl.arange(0, DP)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    row = image * tl.num_programs(0) + program
    if ROWS == 0:
        total = tl.zeros([BLOCK, DP], tl.float32)
        for start in range(0, N, BLOCK):
            j = start + tl.arange(0, BLOCK)
            total += tl.load(q + j[:, None] * q_row + d[None], mask=(j < N)[:, None] & (d < D)[None], other=0.0)
        query = tl.sum(total, 0) / N
    else:
        query = tl.load(q + (program % r) * q_row + d, mask=d < D, other=0.0).to(tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total_of = tl.zeros([], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        keys = tl.load(k + j[:, None] * k_row + d[None], mask=(j < N)[:, None] & (d < D)[None], other=0.0)
        z = tl.sum(keys.to(tl.float32) * query[None], 1) * scale
        if SIZED:
            z += tl.log(tl.load(size + image * N + j, mask=j < N, other=1.0))
        tl.store(out + row * N + j, z, mask=j < N)
        z = tl.where(j < N, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total_of = total_of * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    tl.store(lse + row, top + tl.log(total_of))


@triton.jit(do_not_specialize=["N", "P", "rows"])
def attended(logits, lse, out, N, P, rows, least, BLOCK: tl.constexpr):
    """I_j = max(mean over `rows` of e^(z_j - lse), least) of each patch token.

    Grid: (n / BLOCK, B).

    logits float32 [B, rows, N], lse [B, rows]: what `logits` wrote; out float32 [B, n], n = N - P.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    n = N - P
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        at = image * rows + row
        total += tl.exp(tl.load(logits + at * N + P + token, mask=token < n, other=0.0) - tl.load(lse + at))
    tl.store(out + image * n + token, tl.maximum(total / rows, least), mask=token < n)
