// The order in which persistent CTAs take the tiles of y, and how stream-K shares some of them. The functions read the
// named fields of a kernel's Params, which are flat: the compiler loads those of nested structs and copies worse.
#pragma once

namespace flexq::cuda {

struct TileCoordinates {
  int row_tile, token_tile;
};

// Tile `index` of p.tiles, in bands of p.raster_width tiles along tokens and p.row_tiles along rows: CTAs at work at
// once share rows and tokens.
template <typename Params>
__device__ TileCoordinates tile_coordinates(const Params& p, int index) {
  const int token_tiles = p.tiles / p.row_tiles;
  const int band_tiles = p.raster_width * p.row_tiles;
  const int band = index / band_tiles;
  const int width = min(p.raster_width, token_tiles - band * p.raster_width);
  const int within = index - band * band_tiles;
  const int row_tile = within / width;
  return {row_tile, band * p.raster_width + within % width};
}

// Stream-K: the K steps of all tiles from p.whole_tiles on, end to end, are cut into one even range for each CTA:
// p.steps_per_cta, and one more for the first p.longer_ctas.
template <typename Params>
__device__ int stream_k_begin(const Params& p, int cta) {
  return cta * p.steps_per_cta + min(cta, p.longer_ctas);
}

// K steps begin ... end - 1 of a tile.
struct Work {
  int tile, begin, end;
  __device__ int steps() const { return end - begin; }
};

}  // namespace flexq::cuda
