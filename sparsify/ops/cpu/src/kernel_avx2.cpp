// AVX2 and FMA: float32 storage only.
#include "dense.h"
#include "tiles.h"

namespace sparsify {
const Kernels* kernels_avx2(bool bf16_storage, bool dense) {
  if (bf16_storage) return nullptr;
  return dense ? dense_kernels<float>() : sparse_kernels<float>();
}
}  // namespace sparsify
