// The kernels as torch ops (namespace sparsify_cpu), and their threads: torch's own pool, pieces of work taken in turns.
// Only torch's stable interface is used: a library built with one torch also loads into every later one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "layout.h"

namespace {
using sparsify::Kernels;
using sparsify::Probe;
using sparsify::Problem;
using sparsify::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<int64_t> Ints;

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

const Kernels* kernels(int64_t isa, bool bf16, sparsify::Work work) {
  isa = isa > 0 ? std::min(isa, best_isa()) : best_isa();
  const Kernels* found = isa == 3   ? sparsify::kernels_avx512bf16(bf16, work)
                         : isa == 2 ? sparsify::kernels_avx512(bf16, work)
                         : isa == 1 ? sparsify::kernels_avx2(bf16, work)
                                    : nullptr;
  if (!found && bf16) return kernels(isa, false, work);  // no bfloat16 arithmetic here: float32 storage
  STD_TORCH_CHECK(found, "sparsify_cpu: no kernel for this processor");
  return found;
}

View view(const Tensor& x) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, "sparsify_cpu: the last dimension must be contiguous");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.scalar_type() == ScalarType::BFloat16};
}

// `n` bytes for the kernels, on a cache line.
typedef std::unique_ptr<char, decltype(&std::free)> Bytes;
Bytes bytes(int64_t n) {
  char* at = (char*)std::aligned_alloc(64, (n + 127) / 64 * 64);
  STD_TORCH_CHECK(at, "sparsify_cpu: out of memory");
  return {at, std::free};
}

Tensor empty(const Ints& sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

typedef std::vector<Problem> Problems;  // of each head, or one for all

// Each thread begins at heads of its own, packs one and works through its blocks while they are in its cache; then it helps
// with the others'. Few heads: every one has a workspace. Many: a thread has one, and heads are not shared.
void run(const Problems& problems, const Kernels* k, const Probe* probe) {
  const Problem& first = problems[0];
  const int64_t heads = first.B * first.H, blocks = k->blocks(first), threads = torch::stable::get_num_threads();
  int64_t head_bytes = 0, scratch_bytes = 0;
  for (const Problem& p : problems) {
    head_bytes = std::max(head_bytes, int64_t(k->head_bytes(p) + 63) / 64 * 64);
    scratch_bytes = std::max(scratch_bytes, int64_t(k->scratch_bytes(p) + 63) / 64 * 64);
  }
  const bool shared = heads < 4 * threads;
  const Bytes scratch = bytes(threads * scratch_bytes), space = bytes((shared ? heads : threads) * head_bytes);
  struct alignas(64) Head {
    std::atomic<bool> claimed{false}, ready{false};
    std::atomic<int64_t> next{0};
  };
  std::unique_ptr<Head[]> states(new Head[heads]);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t) {
    char* own = scratch.get() + from * scratch_bytes;
    for (int64_t i = 0; i < heads; i++) {
      const int64_t head = (from * heads / threads + i) % heads, b = head / first.H, h = head % first.H;
      const Problem& p = problems[problems.size() > 1 ? h : 0];
      Head& state = states[head];
      char* at = space.get() + (shared ? head : from) * head_bytes;
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
  p.out = out.mutable_data_ptr(), p.out_bf16 = out.scalar_type() == ScalarType::BFloat16;
  return p;
}

// One number for each of n tokens of each image, [B, n] in any layout: contiguous and of one type; undefined for none.
Tensor numbers(const std::optional<Tensor>& x, const Problem& p, int64_t n, ScalarType type) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == p.B && x->size(1) == n, "sparsify_cpu: inconsistent sizes");
  return torch::stable::contiguous(torch::stable::to(*x, type));
}
const float* floats(const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

#define TENSORS                                                                                                  \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &row, const Tensor &col,                       \
      const std::optional<Tensor>&feature, const std::optional<Tensor>&size, const std::optional<Tensor>&shift,  \
      const std::optional<Tensor>& place
#define CONSTANTS                                                                                                \
  const Ints& ranks, double scale, const Ints& budgets, int64_t prefix, int64_t tail, const Ints& grid, \
      const Ints& cells, const Ints& tile, bool bf16, int64_t isa
#define ALL q, k, v, row, col, feature, size, shift, place, ranks, scale, budgets, prefix, tail, grid, cells, tile, bf16, isa

// Sets the largest of the budgets, of each head or one for all.
void check_budgets(Problem& p, const Ints& budgets) {
  const bool right = int64_t(budgets.size()) == p.H || budgets.size() == 1;
  for (int64_t b : budgets) p.widest = std::max(p.widest, right && b >= 1 && b <= p.N ? b : p.N + 1);
  STD_TORCH_CHECK(right && p.widest <= p.N, "sparsify_cpu: inconsistent budgets");
}

void check_size(const Problem& p) {
  STD_TORCH_CHECK(p.N + p.M + p.P < 65536 && p.d <= 1024, "sparsify_cpu: too many tokens or too large a head");
}

Tensor attend(TENSORS, CONSTANTS, const Tensor& kept, const Tensor& found_cells) {
  Tensor out = empty({q.size(0), q.size(2), q.size(1) * q.size(3)}, q.scalar_type());
  Problem p = shape(q, k, v, scale, out);
  p.row = view(row), p.col = view(col), p.feature = view(feature ? *feature : col);
  p.feature_is_col = !feature;
  std::vector<int64_t> dims(p.H, feature ? feature->size(3) : 0);
  p.ranks = ranks.data(), p.feature_dims = feature ? dims.data() : ranks.data();
  p.P = std::min(prefix, p.N), p.tail = int(tail);
  const int64_t h = grid[0], w = grid[1], n = p.N - p.P, grids = int64_t(cells.size()) / 2;
  const bool grid_fits = place ? h > 0 && w > 0 : h * w == n;
  STD_TORCH_CHECK(int64_t(ranks.size()) == p.H && grid_fits && (grids == 1 || grids == p.H), "sparsify_cpu: inconsistent sizes");
  check_budgets(p, budgets);
  const Tensor sizes = numbers(size, p, p.N, ScalarType::Float), shifts = numbers(shift, p, p.N, ScalarType::Float);
  const Tensor places = numbers(place, p, n, ScalarType::Long);
  const int64_t* patch = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
  bool known = true;
  for (int64_t at = 0; patch && at < p.B * n; at++) known &= uint64_t(patch[at]) < uint64_t(h * w);
  STD_TORCH_CHECK(known, "sparsify_cpu: a place outside the grid");
  p.size = floats(sizes), p.shift = floats(shifts);
  Problems problems(std::max<size_t>(budgets.size(), grids), p);
  std::vector<sparsify::Layout> layouts(problems.size());
  for (size_t i = 0; i < problems.size(); i++) {
    const int64_t* c = cells.data() + (grids > 1 ? 2 * i : 0);
    Problem& own = problems[i];
    own.budget = budgets[budgets.size() > 1 ? i : 0];
    sparsify::lay_out(own, h, w, c[0], c[1], tile.empty() ? 0 : tile[0], tile.empty() ? 0 : tile[1], patch, layouts[i]);
    check_size(own);
  }
  Probe probe{};
  if (kept.defined()) probe = {kept.mutable_data_ptr<int32_t>(), found_cells.mutable_data_ptr<int32_t>()};
  run(problems, kernels(isa, bf16, sparsify::SPARSE), kept.defined() ? &probe : nullptr);
  return out;
}

Tensor sparse_attention(TENSORS, CONSTANTS) { return attend(ALL, {}, {}); }

std::tuple<Tensor, Tensor, Tensor> probe_attention(TENSORS, CONSTANTS) {
  const int64_t widest = budgets.empty() ? 1 : *std::max_element(budgets.begin(), budgets.end());
  Tensor kept = empty({q.size(0), q.size(1), q.size(2), widest}, ScalarType::Int);
  Tensor found = empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Int);
  torch::stable::fill_(kept, -1), torch::stable::fill_(found, -1);
  Tensor out = attend(ALL, kept, found);
  return {out, kept, found};
}

Tensor dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& size, double scale,
                       bool bf16, int64_t isa) {
  Tensor out = empty({q.size(0), q.size(2), q.size(1) * q.size(3)}, q.scalar_type());
  Problem p = shape(q, k, v, scale, out);
  const Tensor sizes = numbers(size, p, p.N, ScalarType::Float);
  p.size = floats(sizes);
  run({p}, kernels(isa, bf16, sparsify::DENSE), nullptr);
  return out;
}

bool same_sizes(const Tensor& x, const Tensor& y) { return x.sizes().vec() == y.sizes().vec(); }

// Whether the first n of `stride` numbers of the patch rows of head h, all of [B, H, N, stride], are in 0..limit-1.
bool within(const int32_t* x, const Problem& p, int64_t h, int64_t stride, int64_t n, int64_t limit) {
  uint32_t most = 0;
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t i = p.P; i < p.N; i++)
      for (int64_t j = 0; j < n; j++) most = std::max(most, uint32_t(x[(((b * p.H + h) * p.N) + i) * stride + j]));
  return int64_t(most) < limit;
}

// Gradients of q, k and v from that of the output and from what the forward kept, `kept` and `cells` of `probe_attention`.
std::tuple<Tensor, Tensor, Tensor> sparse_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kept, const Tensor& cells,
    const std::optional<Tensor>& size, double scale, const Ints& budgets, int64_t prefix, int64_t tail, const Ints& m,
    int64_t isa) {
  auto like = [](const Tensor& x) {  // as `qkv` gives them
    return torch::stable::transpose(empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.scalar_type()), 1, 2);
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  Problem p = shape(q, k, v, scale, grad);
  p.P = std::min(prefix, p.N), p.tail = int(tail);
  check_budgets(p, budgets);
  p.grad = view(grad), p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  const int64_t rows = p.B * p.H * p.N;
  STD_TORCH_CHECK(
      same_sizes(grad, q) && same_sizes(k, q) && same_sizes(v, q) && kept.is_contiguous() &&
          cells.is_contiguous() && kept.numel() == rows * p.widest && cells.numel() == rows &&
          (int64_t(m.size()) == p.H || m.size() == 1),
      "sparsify_cpu: inconsistent sizes");
  p.kept = kept.const_data_ptr<int32_t>(), p.cells = cells.const_data_ptr<int32_t>();
  const Tensor sizes = numbers(size, p, p.N, ScalarType::Float);
  p.size = floats(sizes);
  const std::vector<int64_t> none(p.H, 0);  // no predictor
  p.ranks = p.feature_dims = none.data(), p.feature_is_col = true;
  Problems problems(p.H, p);
  for (int64_t h = 0; h < p.H; h++) {
    Problem& own = problems[h];
    own.budget = budgets[budgets.size() > 1 ? h : 0], own.M = p.P < p.N ? m[m.size() > 1 ? h : 0] : 0;
    check_size(own);
    STD_TORCH_CHECK(within(p.kept, p, h, p.widest, own.budget, p.N) && (!own.M || within(p.cells, p, h, 1, 1, own.M)),
                "sparsify_cpu: no such key or cell");
  }
  run(problems, kernels(isa, false, sparsify::BACKWARD), nullptr);
  return {dq, dk, dv};
}
}  // namespace

STABLE_TORCH_LIBRARY(sparsify_cpu, m) {
  const std::string sparse =
      "(Tensor q, Tensor k, Tensor v, Tensor row, Tensor col, Tensor? feature, Tensor? size, Tensor? shift, "
      "Tensor? place, int[] ranks, float scale, int[] budgets, int prefix, int tail, int[] grid, int[] cells, int[] tile, "
      "bool bf16, int isa) -> ";
  m.def(("sparse_attention" + sparse + "Tensor").c_str());
  m.def(("probe_attention" + sparse + "(Tensor, Tensor, Tensor)").c_str());
  m.def("dense_attention(Tensor q, Tensor k, Tensor v, Tensor? size, float scale, bool bf16, int isa) -> Tensor");
  m.def(
      "sparse_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor kept, Tensor cells, Tensor? size, float scale, "
      "int[] budgets, int prefix, int tail, int[] m, int isa) -> (Tensor, Tensor, Tensor)");
  m.def("best_isa() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(sparsify_cpu, CompositeExplicitAutograd, m) { m.impl("best_isa", TORCH_BOX(&best_isa)); }
STABLE_TORCH_LIBRARY_IMPL(sparsify_cpu, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("probe_attention", TORCH_BOX(&probe_attention));
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
  m.impl("sparse_backward", TORCH_BOX(&sparse_backward));
}
