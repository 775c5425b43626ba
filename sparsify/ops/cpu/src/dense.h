// Dense attention with the same inner loops: the fallback where sparsity does not pay, and the control of every benchmark.
#pragma once
#include "head.h"
#include "tile.h"

namespace {

// Whether keys and values can be packed from where they are.
template <class T> static bool as_is(const Problem& p) {
  return p.d == padded<T>(p.d) && p.k.bf16 == (sizeof(T) == 2) && p.v.bf16 == p.k.bf16 && p.k.stride_n % 2 == 0;
}
// What is written once for each image and head; the bytes that it needs over null.
template <class T> struct Dense {
  void* panels;
  T *K, *V;     // [N, dp] rows to be packed, where they cannot be packed from where they are
  float* bias;  // [N to a multiple of W] log2 of the sizes, where there are any
};
template <class T> static size_t dense_layout(const Problem& p, void* base, Dense<T>* dense) {
  const int64_t dp = padded<T>(p.d), rows = as_is<T>(p) ? 0 : round_up(p.N, 2) * dp * sizeof(T);
  Arena arena(base);
  Dense<T> x;
  x.panels = arena.take(panels_bytes<T>(p.N, dp));
  x.K = (T*)arena.take(rows), x.V = (T*)arena.take(rows);
  x.bias = (float*)arena.take(p.size ? round_up(p.N, W) * 4 : 0);
  if (dense) *dense = x;
  return arena.bytes();
}
template <class T> static size_t dense_head_bytes(const Problem& p) { return dense_layout<T>(p, nullptr, (Dense<T>*)nullptr); }
template <class T> static size_t dense_scratch_bytes(const Problem& p) {
  return tile_scratch<T>(padded<T>(p.d), nullptr, nullptr);
}
static int64_t dense_blocks(const Problem& p) { return (p.N + TILE - 1) / TILE; }

template <class T> static void dense_prepare(const Problem& p, int64_t b, int64_t h, void* base, void*) {
  const int64_t dp = padded<T>(p.d);
  Dense<T> x;
  dense_layout<T>(p, base, &x);
  Panels panels = panels_at<T>(x.panels, p.N, dp);
  if (const float* size = sizes_of(p, b)) {
    for (int64_t i = 0; i < round_up(p.N, W); i++) x.bias[i] = i < p.N ? size[i] : 1.f;
    for (int64_t i = 0; i < p.N; i += W) store(x.bias + i, log2_of(load(x.bias + i)));
  }
  if (as_is<T>(p)) {
    const T *K = (const T*)row_of(p.k, b, h, 0), *V = (const T*)row_of(p.v, b, h, 0);
    return pack_list(K, p.k.stride_n, V, p.v.stride_n, dp, nullptr, p.N, panels);
  }
  for (int64_t i = 0; i < p.N; i++) {
    read_row_as(p.k, b, h, i, p.d, dp, x.K + i * dp), read_row_as(p.v, b, h, i, p.d, dp, x.V + i * dp);
  }
  pack_list(x.K, dp, x.V, dp, dp, nullptr, p.N, panels);
}

template <class T>
static void dense_block(const Problem& p, int64_t b, int64_t h, int64_t which, const void* base, void* scratch, const Probe*) {
  const int64_t dp = padded<T>(p.d), first = which * TILE;
  const int rows = int(min_of<int64_t>(TILE, p.N - first));
  Dense<T> dense;
  dense_layout<T>(p, const_cast<void*>(base), &dense);
  Panels panels = panels_at<T>(dense.panels, p.N, dp);
  TileScratch<T> x;
  tile_scratch(dp, scratch, &x);
  alignas(64) float by[TILE];
  for (int i = 0; i < rows; i++) read_row_as(p.q, b, h, first + i, p.d, dp, x.q + i * dp), prefetch_out(p, b, h, first + i);
  attend_tile(panels, p.N, p.size ? dense.bias : nullptr, dp, rows, p.scale * LOG2E, x, by);
  for (int i = 0; i < rows; i++) write_out(p, b, h, first + i, x.out + i * panels.columns * PANEL, by[i]);
}

template <class T> static const Kernels* dense_kernels() {
  static const Kernels k = {dense_head_bytes<T>, dense_scratch_bytes<T>, dense_blocks, dense_prepare<T>, dense_block<T>};
  return &k;
}

}  // namespace
