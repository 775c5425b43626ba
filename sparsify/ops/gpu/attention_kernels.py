"""Dense attention over tokens of different sizes in Triton; `sparsify.ops.attention.dense` is the reference."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "N"])
def sized(
    q, k, v, size, out, scale,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, M, N,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention with log s_j added to the logit of key j, by the online softmax (FlashAttention-2, arXiv 2307.08691).

        out_i = sum_j s_j e^(q_i . k_j scale) v_j / sum_j s_j e^(q_i . k_j scale)

    Grid: (M / ROWS, H, B).

    q [B, H, M, D], k, v [B, H, N, D] with strides, the last 1; size float32 [B, N]; out [B, M, H * D]. DP: D, padded.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    size += image * N
    if DP == D:
        query = tl.load(q + i[:, None] * q_row + d[None], mask=(i < M)[:, None], other=0.0)
    else:
        query = tl.load(q + i[:, None] * q_row + d[None], mask=(i < M)[:, None] & (d < D)[None], other=0.0)
    total = tl.zeros([ROWS, DP], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    in_base_2 = scale * 1.4426950408889634  # log2(e): exp2 is one instruction
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        if DP == D:
            keys = tl.load(k + j[None] * k_row + d[:, None], mask=(j < N)[None], other=0.0)
            values = tl.load(v + j[:, None] * v_row + d[None], mask=(j < N)[:, None], other=0.0)
        else:
            keys = tl.load(k + j[None] * k_row + d[:, None], mask=(j < N)[None] & (d < D)[:, None], other=0.0)
            values = tl.load(v + j[:, None] * v_row + d[None], mask=(j < N)[:, None] & (d < D)[None], other=0.0)
        z = tl.dot(query, keys) * in_base_2
        z += tl.where(j < N, tl.log2(tl.load(size + j, mask=j < N, other=1.0)), float("-inf"))[None]
        higher = tl.maximum(top, tl.max(z, 1))
        e = tl.exp2(z - higher[:, None])
        shrink = tl.exp2(top - higher)
        weights = weights * shrink + tl.sum(e, 1)
        total = tl.dot(e.to(values.dtype), values, total * shrink[:, None])
        top = higher
    mean = (total / weights[:, None]).to(out.dtype.element_ty)
    target = out + ((image * M + i) * H + head)[:, None] * D + d[None]
    if DP == D:
        tl.store(target, mean, mask=(i < M)[:, None])
    else:
        tl.store(target, mean, mask=(i < M)[:, None] & (d < D)[None])
