// Where the patch tokens stand on the grid: the cell in which each starts, and the tokens tile by tile. For those who make a
// Problem; the kernels, which are linked without the C++ library, do not include it.
#pragma once
#include <algorithm>
#include <vector>

#include "problem.h"

namespace sparsify {

struct Layout {
  std::vector<int32_t> start_cell, tile_start, tile_token;
};

// of_y(y) * columns + of_x(x) of every patch, row by row.
template <class Y, class X> std::vector<int32_t> number(int64_t h, int64_t w, int64_t columns, Y of_y, X of_x) {
  std::vector<int32_t> found;
  for (int64_t y = 0; y < h; y++)
    for (int64_t x = 0; x < w; x++) found.push_back(int32_t(of_y(y) * columns + of_x(x)));
  return found;
}

// Sets what p says of cells and tiles, over the memory of `to`. place [B, N - P]: patch of each patch token, all of them in
// 0..h*w-1; null: the patches in order, the same for every image. Tiles of th x tw patches; th = 0: none.
inline void lay_out(Problem& p, int64_t h, int64_t w, int64_t rows, int64_t cols, int64_t th, int64_t tw, const int64_t* place,
                    Layout& to) {
  const int64_t n = p.N - p.P, images = place ? p.B : 1;
  p.placed = place != nullptr, p.tiles = 0, p.tile_rows = 0;
  p.M = p.tail == TAIL_MEAN && n > 0 ? 1 : 0;
  if (n == 0) return;
  auto patch = [&](int64_t at) { return place ? place[at] : at; };
  if (p.tail >= TAIL_CELLS) {
    rows = std::min(rows, h), cols = std::min(cols, w), p.M = rows * cols;
    const auto cell = number(h, w, cols, [&](int64_t y) { return y * rows / h; }, [&](int64_t x) { return x * cols / w; });
    to.start_cell.resize(images * n);
    for (int64_t at = 0; at < images * n; at++) to.start_cell[at] = cell[patch(at)];
    p.start_cell = to.start_cell.data();
  }
  if (th == 0) return;
  const int64_t across = (w + tw - 1) / tw, all = (h + th - 1) / th * across;
  const auto tile = number(h, w, across, [&](int64_t y) { return y / th; }, [&](int64_t x) { return x / tw; });
  p.tiles = std::min(all, n);
  to.tile_start.assign(images * (p.tiles + 1), int32_t(n)), to.tile_token.resize(images * n);
  std::vector<int32_t> next(all);
  for (int64_t b = 0; b < images; b++) {  // by counting: tokens of one tile keep their order
    std::fill(next.begin(), next.end(), 0);
    for (int64_t i = 0; i < n; i++) next[tile[patch(b * n + i)]]++;
    int32_t *start = to.tile_start.data() + b * (p.tiles + 1), at = 0;
    for (auto& x : next)
      if (const int32_t tokens = x) *start++ = at, x = at, at += tokens, p.tile_rows = std::max<int64_t>(p.tile_rows, tokens);
    for (int64_t i = 0; i < n; i++) to.tile_token[b * n + next[tile[patch(b * n + i)]]++] = int32_t(p.P + i);
  }
  p.tile_start = to.tile_start.data(), p.tile_token = to.tile_token.data();
}

}  // namespace sparsify
