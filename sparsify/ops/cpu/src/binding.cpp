// The kernels as torch ops (namespace sparsify_cpu), and their threads: torch's own pool, pieces of work taken in turns.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "problem.h"

namespace {
using at::Tensor;
using sparsify::Kernels;
using sparsify::Probe;
using sparsify::Problem;
using sparsify::View;

// What this processor can run: 3 AVX-512 with bfloat16, 2 AVX-512, 1 AVX2, 0 none of them.
int64_t best_isa() {
  static const int64_t best = [] {
    __builtin_cpu_init();
#define HAS(x) __builtin_cpu_supports(x)
    if (!(HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2"))) return 0;
    if (!(HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl"))) return 1;
    return HAS("avx512bf16") && HAS("avx512vbmi") && HAS("avx512vbmi2") && HAS("avx512vnni") ? 3 : 2;
#undef HAS
  }();
  return best;
}

const Kernels* kernels(int64_t isa, bool bf16, bool dense) {
  isa = isa > 0 ? std::min(isa, best_isa()) : best_isa();
  const Kernels* found = isa == 3   ? sparsify::kernels_avx512bf16(bf16, dense)
                         : isa == 2 ? sparsify::kernels_avx512(bf16, dense)
                         : isa == 1 ? sparsify::kernels_avx2(bf16, dense)
                                    : nullptr;
  if (!found && bf16) return kernels(isa, false, dense);  // no bfloat16 arithmetic here: float32 storage
  TORCH_CHECK(found, "sparsify_cpu: no kernel for this processor");
  return found;
}

View view(const Tensor& x) {
  TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, "sparsify_cpu: the last dimension must be contiguous");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.scalar_type() == at::kBFloat16};
}

char* aligned(const Tensor& x) { return (char*)(((uintptr_t)x.data_ptr() + 63) / 64 * 64); }

// Each thread begins at heads of its own, packs one and works through its blocks while they are in its cache; then it helps
// with the others'. Few heads: every one has a workspace. Many: a thread has one, and heads are not shared.
void run(const Problem& p, const Kernels* k, const Probe* probe) {
  const int64_t heads = p.B * p.H, blocks = k->blocks(p), threads = at::get_num_threads();
  const int64_t head_bytes = (k->head_bytes(p) + 63) / 64 * 64, scratch_bytes = (k->scratch_bytes(p) + 63) / 64 * 64;
  const bool shared = heads < 4 * threads;
  auto bytes = [](int64_t n) { return at::empty({n + 64}, at::TensorOptions().dtype(at::kByte)); };
  Tensor scratch = bytes(threads * scratch_bytes), space = bytes((shared ? heads : threads) * head_bytes);
  struct alignas(64) Head {
    std::atomic<bool> claimed{false}, ready{false};
    std::atomic<int64_t> next{0};
  };
  std::unique_ptr<Head[]> states(new Head[heads]);
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t) {
    char* own = aligned(scratch) + from * scratch_bytes;
    for (int64_t i = 0; i < heads; i++) {
      const int64_t head = (from * heads / threads + i) % heads, b = head / p.H, h = head % p.H;
      Head& state = states[head];
      char* at = aligned(space) + (shared ? head : from) * head_bytes;
      if (!state.claimed.exchange(true)) {
        k->prepare(p, b, h, at, own);
        state.ready.store(true, std::memory_order_release);
      } else if (!shared) {
        continue;
      }
      while (!state.ready.load(std::memory_order_acquire)) std::this_thread::yield();
      for (int64_t block; (block = state.next++) < blocks;) k->block(p, b, h, block, at, own, probe);
    }
  });
}

Problem shape(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& out) {
  Problem p{};
  p.B = q.size(0), p.H = q.size(1), p.N = q.size(2), p.d = q.size(3);
  p.q = view(q), p.k = view(k), p.v = view(v);
  p.scale = float(scale);
  p.out = out.data_ptr(), p.out_bf16 = out.scalar_type() == at::kBFloat16;
  return p;
}

// Patches of a grid in the order of its tiles: starts and tokens.
void tile_order(int64_t h, int64_t w, int64_t th, int64_t tw, int64_t prefix, std::vector<int32_t>& start, std::vector<int32_t>& token) {
  for (int64_t y = 0; y < h; y += th)
    for (int64_t x = 0; x < w; x += tw) {
      start.push_back(int32_t(token.size()));
      for (int64_t i = y; i < std::min(h, y + th); i++)
        for (int64_t j = x; j < std::min(w, x + tw); j++) token.push_back(int32_t(prefix + i * w + j));
    }
  start.push_back(int32_t(token.size()));
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row, const Tensor& col,
              const std::optional<Tensor>& feature, at::IntArrayRef ranks, double scale, int64_t budget, int64_t prefix,
              int64_t tail, at::IntArrayRef grid, at::IntArrayRef cells, at::IntArrayRef tile, bool bf16, int64_t isa,
              const std::optional<Tensor>& kept, const std::optional<Tensor>& found_cells) {
  Tensor out = at::empty({q.size(0), q.size(2), q.size(1) * q.size(3)}, q.options().memory_format(std::nullopt));
  Problem p = shape(q, k, v, scale, out);
  p.row = view(row), p.col = view(col), p.feature = view(feature ? *feature : col);
  p.feature_is_col = !feature;
  std::vector<int64_t> dims(p.H, feature ? feature->size(3) : 0);
  p.ranks = ranks.data(), p.feature_dims = feature ? dims.data() : ranks.data();
  p.P = std::min(prefix, p.N), p.budget = budget, p.tail = int(tail);
  const int64_t h = grid[0], w = grid[1], n = p.N - p.P;
  TORCH_CHECK(int64_t(ranks.size()) == p.H && h * w == n && budget >= 1 && budget <= p.N, "sparsify_cpu: inconsistent sizes");
  std::vector<int32_t> start_cell, tile_start, tile_token;
  if (tail >= sparsify::TAIL_CELLS && n > 0) {
    const int64_t rows = std::min(cells[0], h), cols = std::min(cells[1], w);
    for (int64_t y = 0; y < h; y++)
      for (int64_t x = 0; x < w; x++) start_cell.push_back(int32_t((y * rows / h) * cols + x * cols / w));
    p.M = rows * cols;
  } else {
    p.M = tail == sparsify::TAIL_MEAN && n > 0 ? 1 : 0;
  }
  TORCH_CHECK(p.N + p.M + p.P < 65536 && p.d <= 1024, "sparsify_cpu: too many tokens or too large a head");
  p.start_cell = start_cell.data();
  if (!tile.empty() && n > 0) {
    tile_order(h, w, tile[0], tile[1], p.P, tile_start, tile_token);
    p.tiles = int64_t(tile_start.size()) - 1, p.tile_start = tile_start.data(), p.tile_token = tile_token.data();
  }
  Probe probe{kept ? kept->data_ptr<int32_t>() : nullptr, found_cells ? found_cells->data_ptr<int32_t>() : nullptr};
  run(p, kernels(isa, bf16, false), kept ? &probe : nullptr);
  return out;
}

Tensor sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row, const Tensor& col,
                        const std::optional<Tensor>& feature, at::IntArrayRef ranks, double scale, int64_t budget,
                        int64_t prefix, int64_t tail, at::IntArrayRef grid, at::IntArrayRef cells, at::IntArrayRef tile,
                        bool bf16, int64_t isa) {
  return attend(q, k, v, row, col, feature, ranks, scale, budget, prefix, tail, grid, cells, tile, bf16, isa, {}, {});
}

std::tuple<Tensor, Tensor, Tensor> probe_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row, const Tensor& col,
    const std::optional<Tensor>& feature, at::IntArrayRef ranks, double scale, int64_t budget, int64_t prefix,
    int64_t tail, at::IntArrayRef grid, at::IntArrayRef cells, at::IntArrayRef tile, bool bf16, int64_t isa) {
  auto ints = at::TensorOptions().dtype(at::kInt);
  Tensor kept = at::empty({q.size(0), q.size(1), q.size(2), budget}, ints).fill_(-1);
  Tensor found = at::empty({q.size(0), q.size(1), q.size(2)}, ints).fill_(-1);
  Tensor out = attend(q, k, v, row, col, feature, ranks, scale, budget, prefix, tail, grid, cells, tile, bf16, isa, kept, found);
  return {out, kept, found};
}

Tensor dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool bf16, int64_t isa) {
  Tensor out = at::empty({q.size(0), q.size(2), q.size(1) * q.size(3)}, q.options().memory_format(std::nullopt));
  Problem p = shape(q, k, v, scale, out);
  run(p, kernels(isa, bf16, true), nullptr);
  return out;
}
}  // namespace

TORCH_LIBRARY(sparsify_cpu, m) {
  const std::string sparse =
      "(Tensor q, Tensor k, Tensor v, Tensor row, Tensor col, Tensor? feature, int[] ranks, float scale, int budget, "
      "int prefix, int tail, int[] grid, int[] cells, int[] tile, bool bf16, int isa) -> ";
  m.def(("sparse_attention" + sparse + "Tensor").c_str());
  m.def(("probe_attention" + sparse + "(Tensor, Tensor, Tensor)").c_str());
  m.def("dense_attention(Tensor q, Tensor k, Tensor v, float scale, bool bf16, int isa) -> Tensor");
  m.def("best_isa() -> int", best_isa);
}
TORCH_LIBRARY_IMPL(sparsify_cpu, CPU, m) {
  m.impl("sparse_attention", sparse_attention);
  m.impl("probe_attention", probe_attention);
  m.impl("dense_attention", dense_attention);
}
