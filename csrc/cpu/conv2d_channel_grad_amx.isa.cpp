// conv2d_channel_grad of bfloat16 by the matrix tiles of AMX.
//
// The result is a product of two matrices, grad_output's and the input's under every tap, summed over pixels, 32 at a
// step. A tile instruction takes 16 rows of one, each the pixels of a step (form A), and 16 columns of the other, pairs
// of pixels after one another (form B). A plane of adjacent pixels is a row of form A where it lies; pixels of adjacent
// channels become form B by interleaving two of them. The other two cases cost a transposition. The input is small and
// is brought into its form once for all outputs; grad_output goes by, 32 outputs at a time.
#include "conv2d_channel_grad.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

constexpr int64_t kStep = 32;         // pixels of a tile
constexpr int64_t kLines = 16;        // rows of form A, columns of form B
constexpr int64_t kTileBytes = 1024;  // 16 lines of 32 elements, or 16 x 16 sums
constexpr int64_t kTileSums = 256;
// The most pixels that are summed at a time: 32 lines of both matrices fit into 32 KB. Where the sums themselves are
// more than the second-level cache holds, they should be read and written less often.
constexpr int64_t kPixels = 256, kPixelsOfMany = 512, kManySums = 1536 * kTileSums;
constexpr int64_t kMaxInputTiles = 40;   // 640 KB in their form
constexpr int64_t kMaxRegion = 1 << 20;  // elements of the packed input

TRADY_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
TRADY_INLINE int64_t clamp(int64_t a, int64_t low, int64_t high) { return max(low, min(a, high)); }
TRADY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
TRADY_INLINE uint32_t first(int64_t count) { return static_cast<uint32_t>((uint64_t{1} << count) - 1); }

// ---- the product ------------------------------------------------------------------------------------------------

// The thread's own configuration of the tiles, which others (oneDNN) take for granted, comes back in the end.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(saved_);
    // Every tile: 16 lines of 64 bytes.
    alignas(64) uint8_t wanted[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
      wanted[16 + 2 * tile] = 64;
      wanted[48 + tile] = 16;
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(wanted);
  }
  ~Tiles() {
    if (saved_[0] == 0)
      _tile_release();
    else
      _tile_loadconfig(saved_);
  }
  Tiles(const Tiles&) = delete;

 private:
  alignas(64) uint8_t saved_[64];
};

// Steps whose tiles of form A lie `step` bytes apart, with `line` bytes from line to line.
struct Segment {
  const char* from[2];
  int64_t line, step, steps;
};

// sums[a][b] += the products of two (or one) tiles of form A with two (or one) of form B, which follow each other step
// by step. The first time the sums begin at zero.
template <int AS, int BS>
__attribute__((noinline)) void multiply(const Segment* segments, int64_t count, const char* b0, const char* b1,
                                        float* const* sums, const float* const* begin) {
  asm volatile("" ::: "memory");  // GCC 12 does not know that tiles are loaded from memory
  if (begin) {
    _tile_loadd(0, begin[0], 64);
    if constexpr (BS > 1) _tile_loadd(1, begin[1], 64);
    if constexpr (AS > 1) _tile_loadd(2, begin[2], 64);
    if constexpr (AS > 1 && BS > 1) _tile_loadd(3, begin[3], 64);
  } else {
    _tile_zero(0);
    if constexpr (BS > 1) _tile_zero(1);
    if constexpr (AS > 1) _tile_zero(2);
    if constexpr (AS > 1 && BS > 1) _tile_zero(3);
  }
  for (const Segment* s = segments; s < segments + count; s++) {
    const char *a0 = s->from[0], *a1 = s->from[AS - 1];
    const int64_t line = s->line, step = s->step;
    for (int64_t i = s->steps; i > 0; i--) {
      _tile_loadd(6, b0, 64);
      _tile_loadd(4, a0, line);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (BS > 1) {
        _tile_loadd(7, b1, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (AS > 1) {
        _tile_loadd(5, a1, line);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (BS > 1) _tile_dpbf16ps(3, 5, 7);
      }
      a0 += step;
      a1 += step;
      b0 += kTileBytes;
      b1 += kTileBytes;
    }
  }
  _tile_stored(0, sums[0], 64);
  if constexpr (BS > 1) _tile_stored(1, sums[1], 64);
  if constexpr (AS > 1) _tile_stored(2, sums[2], 64);
  if constexpr (AS > 1 && BS > 1) _tile_stored(3, sums[3], 64);
  asm volatile("" ::: "memory");
}

// ---- forms ------------------------------------------------------------------------------------------------------

// out[j][i] = in[i][j] of 16 x 16 elements of 4 bytes; lines of `out` are 64 bytes apart. Quarters of the lines are
// brought to their places as they are loaded, which leaves half of the permutations.
TRADY_INLINE void transpose_tile(const char* in, int64_t line, char* out) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; quarter++) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const char* from = in + i * line + 16 * quarter;
      const auto load4 = [](const char* p) INLINED { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
      v[i] = _mm512_castsi128_si512(load4(from));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x00f0, load4(from + 4 * line));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x0f00, load4(from + 8 * line));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0xf000, load4(from + 12 * line));
    }
    const __m512i low = _mm512_maskz_unpacklo_epi32(ALL, v[0], v[1]),
                  high = _mm512_maskz_unpackhi_epi32(ALL, v[0], v[1]);
    const __m512i low2 = _mm512_maskz_unpacklo_epi32(ALL, v[2], v[3]),
                  high2 = _mm512_maskz_unpackhi_epi32(ALL, v[2], v[3]);
    char* to = out + 256 * quarter;
    _mm512_storeu_si512(to, _mm512_maskz_unpacklo_epi64(0xff, low, low2));
    _mm512_storeu_si512(to + 64, _mm512_maskz_unpackhi_epi64(0xff, low, low2));
    _mm512_storeu_si512(to + 128, _mm512_maskz_unpacklo_epi64(0xff, high, high2));
    _mm512_storeu_si512(to + 192, _mm512_maskz_unpackhi_epi64(0xff, high, high2));
  }
}

// Form B of `count` adjacent channels at pixels that lie at from[offsets[]]; behind the last are zeros. Tiles of 16
// channels are `pitch` bytes apart.
TRADY_INLINE void interleave_pixels(const bfloat16* from, const int64_t* offsets, int64_t pixels, int64_t steps,
                                    int64_t count, char* out, int64_t pitch, bool distant) {
  constexpr int64_t ahead = 16;  // pixels
  constexpr u16 order_low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                             8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  constexpr u16 order_high = order_low + static_cast<uint16_t>(kLines);
  const int64_t whole = count / kStep * kStep;
  const int left = static_cast<int>(count - whole);
  const auto put = [&](char* to, u16 a, u16 b, bool two) INLINED {
    store_operand(reinterpret_cast<bfloat16*>(to), shuffle(a, b, order_low));
    if (two) store_operand(reinterpret_cast<bfloat16*>(to + pitch), shuffle(a, b, order_high));
  };
  int64_t p = 0;
  for (; p < pixels; p += 2, out += 64) {
    const bool both = p + 1 < pixels;
    const bfloat16 *a = from + offsets[p], *b = from + offsets[both ? p + 1 : p];
    if (distant && p + ahead + 1 < pixels)
      for (int64_t c = 0; c < count; c += kStep) {
        prefetch(from + offsets[p + ahead] + c);
        prefetch(from + offsets[p + ahead + 1] + c);
      }
    char* to = out;
    int64_t c = 0;
    for (; c < whole; c += kStep, to += 2 * pitch)
      put(to, load_operand(a + c), both ? load_operand(b + c) : u16{}, true);
    if (left) put(to, load_first_operand(a + c, left), load_first_operand(b + c, both ? left : 0), left > kLines);
  }
  for (; p < steps * kStep; p += 2, out += 64)
    for (int64_t c = 0; c < count; c += kLines)
      store_operand(reinterpret_cast<bfloat16*>(out + c / kLines * pitch), u16{});
}

// The pixels of a tile of the plan. In steps go, in this order: of each image the pixels that make up whole steps; then
// those that are left of all images, one behind another; then zeros.
struct Pixels {
  int64_t image, images, begin, pixels;
  int64_t whole;  // of each image, in whole steps
  int64_t left() const { return pixels - whole; }
  int64_t whole_steps() const { return images * whole / kStep; }
  int64_t left_steps() const { return ceil_div(images * left(), kStep); }
  int64_t steps() const { return whole_steps() + left_steps(); }
};

// Neighbouring tiles of lines out of `lines` that begin at line `base`.
struct Lines {
  int64_t base, lines, tile, tiles;
};

// One of the two matrices at the pixels of a tile: lines of adjacent pixels, or pixels of adjacent lines (channels).
struct Matrix {
  bool adjacent_pixels;
  const bfloat16* from;    // at the tile's first pixel, where pixels are adjacent
  int64_t line, image;     // where they are: distances
  const int64_t* offsets;  // where they are not: of the pixels in order
  bool distant;            // not in the caches yet
  bool read_often;

  // The last tile of lines of adjacent pixels reaches back over some of the one before rather than behind them.
  int64_t begin_of(int64_t lines, int64_t tile) const {
    return adjacent_pixels ? clamp(lines - kLines, 0, tile * kLines) : tile * kLines;
  }
  const bfloat16* tile_at(const Lines& l, int64_t tile) const {
    return from + (l.base + begin_of(l.lines, tile)) * line;
  }

  // Steps of a tile of lines that are gathered: those behind the whole ones, of all images together; or all, where
  // there are less than 16 lines, or they are read often and each element of a tile would be in two cache lines. In
  // lines of that many and one more, unused.
  bool gathers_all(const Lines& l) const { return l.lines < kLines || (read_often && line % 16 != 0); }
  int64_t gathered_steps(const Pixels& p, const Lines& l) const { return gathers_all(l) ? p.steps() : p.left_steps(); }
  int64_t gathered_line(const Pixels& p, const Lines& l) const { return (gathered_steps(p, l) + 1) * kStep; }
  void gather(const Pixels& p, const Lines& l, int64_t tile, bfloat16* out) const {
    for (int64_t i = 0; i < kLines; i++, out += gathered_line(p, l)) {
      if (i >= l.lines) {
        for (int64_t q = 0; q < gathered_steps(p, l); q++) store_operand(out + q * kStep, u16{});
        continue;
      }
      const bfloat16* in = tile_at(l, tile) + i * line;
      bfloat16* to = out;
      if (gathers_all(l))
        for (int64_t n = 0; n < p.images; n++)
          for (int64_t q = 0; q < p.whole; q += kStep, to += kStep) store_operand(to, load_operand(in + n * image + q));
      // In order: what is written too far is overwritten.
      const int left = static_cast<int>(p.left());
      if (left == 0) continue;
      in += p.whole;
      for (int64_t n = 0; n < p.images; n++, in += image, to += left) store_operand(to, load_first_operand(in, left));
      store_operand(to, u16{});
    }
  }

  // What of form A does not lie in memory like that.
  void to_a(const Pixels& p, const Lines& l, char* out, int64_t pitch) const {
    if (adjacent_pixels) {
      for (int64_t t = 0; t < l.tiles && gathered_steps(p, l) > 0; t++)
        gather(p, l, l.tile + t, reinterpret_cast<bfloat16*>(out + t * pitch));
      return;
    }
    constexpr int64_t most = 8, apart = kTileBytes + 64;
    alignas(64) char pairs[most * apart];
    for (int64_t s = 0; s < p.steps(); s++)
      for (int64_t t = 0; t < l.tiles; t += most) {
        const int64_t first_line = (l.tile + t) * kLines, tiles = min(most, l.tiles - t);
        interleave_pixels(from + l.base + first_line, offsets + s * kStep, min(kStep, p.images * p.pixels - s * kStep),
                          1, min(tiles * kLines, l.lines - first_line), pairs, apart, distant);
        for (int64_t i = 0; i < tiles; i++)
          transpose_tile(pairs + i * apart, 64, out + (t + i) * pitch + s * kTileBytes);
      }
  }
  // A tile in form A, of which to_a() has put into `room` what it must. Returns the number of segments.
  int64_t segments(const Pixels& p, const Lines& l, int64_t tile, const char* room, Segment* out, int which) const {
    if (!adjacent_pixels) return put(out, 0, which, room, 64, kTileBytes, p.steps());
    int64_t count = 0;
    if (p.whole > 0 && !gathers_all(l))
      for (int64_t n = 0; n < p.images; n++)
        count = put(out, count, which, reinterpret_cast<const char*>(tile_at(l, tile) + n * image), line * 2, 64,
                    p.whole / kStep);
    if (gathered_steps(p, l) > 0)
      count = put(out, count, which, room, gathered_line(p, l) * 2, 64, gathered_steps(p, l));
    return count;
  }
  static int64_t put(Segment* segments, int64_t at, int which, const char* from, int64_t line, int64_t step,
                     int64_t steps) {
    segments[at].from[which] = from;
    segments[at].line = line;
    segments[at].step = step;
    segments[at].steps = steps;
    return at + 1;
  }

  // Form B; `room` is for a tile of gathered lines.
  void to_b(const Pixels& p, const Lines& l, char* out, int64_t pitch, bfloat16* room) const {
    if (!adjacent_pixels) {
      const int64_t first_line = l.tile * kLines;
      interleave_pixels(from + l.base + first_line, offsets, p.images * p.pixels, p.steps(),
                        min(l.tiles * kLines, l.lines - first_line), out, pitch, distant);
      return;
    }
    for (int64_t t = l.tile; t < l.tile + l.tiles; t++, out += pitch) {
      char* to = out;
      for (int64_t n = 0; n < p.images && !gathers_all(l); n++)
        for (int64_t q = 0; q < p.whole; q += kStep, to += kTileBytes)
          transpose_tile(reinterpret_cast<const char*>(tile_at(l, t) + n * image + q), line * 2, to);
      if (gathered_steps(p, l) == 0) continue;
      gather(p, l, t, room);
      for (int64_t q = 0; q < gathered_steps(p, l); q++, to += kTileBytes)
        transpose_tile(reinterpret_cast<const char*>(room + q * kStep), gathered_line(p, l) * 2, to);
    }
  }
};

// ---- how a problem is cut -----------------------------------------------------------------------------------------

// What follows from the shape and the strides.
struct Layout {
  const Conv2dChannelGrad& q;
  bool is_point() const { return q.kernel[0] * q.kernel[1] == 1; }
  bool unpadded() const { return q.padding[0] + q.padding[1] == 0; }
  // Pixels of grad_output and of the input in place.
  bool grad_planes() const {
    return q.grad_stride[3] == 1 && q.grad_stride[2] == q.out_width && q.out_height * q.out_width > 1;
  }
  bool input_planes() const {
    return is_point() && unpadded() && q.stride[0] * q.stride[1] == 1 && q.input_stride[3] == 1 &&
           q.input_stride[2] == q.width && q.height * q.width > 1;
  }
  bool input_pixels() const { return !input_planes() && is_point() && unpadded() && q.input_stride[1] == 1; }
  bool packs() const { return !input_planes() && !input_pixels(); }
  bool readable() const {
    return (grad_planes() || q.grad_stride[1] == 1) && (!packs() || q.input_stride[1] == 1 || q.input_stride[3] == 1);
  }

  // Lines of the input are (tap, channel). Those of a kernel row lie behind one another in the packed input if there
  // is no dilation: runs.
  int64_t taps_in_run() const { return q.dilation[1] == 1 ? q.kernel[1] : 1; }
  int64_t runs() const { return q.kernel[0] * q.kernel[1] / taps_in_run(); }
  int64_t tiles_in_run(int64_t channels) const { return ceil_div(taps_in_run() * channels, kLines); }
  int64_t input_tiles(int64_t channels) const { return runs() * tiles_in_run(channels); }
  int64_t grad_tiles() const { return ceil_div(q.out_per_group, kLines); }
  // Tiles that are brought into their form together where not all are: of grad_output, and two a run of the input.
  int64_t group(bool of_input) const { return of_input && runs() > 1 ? 2 * runs() : 4; }

  // At stride 1 what a kernel row meets at a pixel the next one meets a row of pixels before: in form B their lines are
  // the same, so many bytes apart, if pairs of pixels stay pairs.
  bool rows_alike() const {
    return packs() && q.stride[0] == 1 && q.dilation[1] == 1 && q.kernel[0] > 1 && q.tile_images == 1 &&
           down() % 2 == 0 && down() <= q.tile_pixels;  // they share the room of as many tiles
  }
  int64_t down() const { return q.dilation[0] * q.out_width; }
  int64_t pixels_below() const { return rows_alike() ? (q.kernel[0] - 1) * down() : 0; }

  // Packed input: of an axis with one tap, only what it meets.
  int64_t step(int axis) const { return q.kernel[axis] == 1 ? 1 : q.stride[axis]; }
  int64_t extent(int axis, int64_t count) const {
    return (count - 1) * step(axis) + (q.kernel[axis] - 1) * q.dilation[axis] + 1;
  }
  int64_t most_rows() const { return min(q.out_height, (q.tile_pixels + q.out_width - 2) / q.out_width + 1); }
  int64_t region(int64_t channels) const {
    return packs() ? q.tile_images * extent(0, most_rows()) * extent(1, q.out_width) * channels : 0;
  }
  int64_t most_steps() const { return ceil_div(q.tile_images * q.tile_pixels, kStep); }
  int64_t tiles_in_slice() const { return ceil_div(q.tiles, q.slices); }
};

// From tile to tile of what is brought into a form: room for gathered lines too, and 64 bytes that bring neighbours
// into different sets of the first-level cache.
TRADY_INLINE int64_t pitch_of(int64_t steps) { return (steps + 1) * kTileBytes + 64; }

// Parts of the scratch memory, in bytes. The matrix with less lines is brought into its form as a whole, the other one
// a few tiles at a time.
struct Room {
  int64_t input_offsets, grad_offsets, whole, some, gathered, region, sums, bytes;
  explicit Room(const Layout& l) {
    const int64_t channels = l.q.range_channels, tiles = l.input_tiles(channels) + l.q.with_bias;
    const int64_t pitch = pitch_of(l.most_steps()), offsets = l.most_steps() * kStep * 8;
    const bool input_is_whole = tiles <= l.grad_tiles();
    bytes = 0;
    input_offsets = take(offsets + l.pixels_below() * 8);
    grad_offsets = take(offsets);
    some = take(l.group(!input_is_whole) * pitch);
    gathered = take(pitch);
    whole = take(min(tiles, l.grad_tiles()) * pitch);
    region = take(l.region(channels) * 2 + 64);
    sums = take((l.tiles_in_slice() > 1 ? tiles * l.grad_tiles() : 4) * kTileBytes);
  }
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  }
};

// ---- a task -------------------------------------------------------------------------------------------------------

struct Task {
  Task(const Conv2dChannelGrad& problem, void* room) : q(problem), scratch(static_cast<char*>(room)) {}

  const Conv2dChannelGrad& q;
  char* scratch;
  const Layout layout{q};
  const Room room{layout};
  float* partial = nullptr;  // this slice's, (k, kh, kw, C'/groups)
  float* bias = nullptr;
  int64_t channel = 0, channels = 0;  // of this range
  int64_t input_tiles = 0;            // without that of the bias
  bool input_is_a = false, input_is_whole = false;
  bool rows_are_alike = false;  // at this tile's pixels
  bool keeps_sums = false;      // from tile to tile of pixels
  int64_t pitch = 0;
  int64_t some_begin = 0;  // the tile of the other matrix that is first in its room
  Pixels pixels = {};
  Matrix input = {}, grad = {};
  int64_t row = 0, rows = 0;  // of the output: those that the tile's pixels lie in

  int64_t all_input_tiles() const { return input_tiles + (bias != nullptr); }
  const bfloat16* input_at(int64_t n, int64_t c) const {
    return static_cast<const bfloat16*>(q.input) + n * q.input_stride[0] + c * q.input_stride[1];
  }

  // ---- pixels of adjacent channels ----

  // Offsets of the tile's pixels, in order, for distances of an image, a row and a column; the tile's first row is at
  // zero.
  void put_offsets(int64_t* out, int64_t image, int64_t down, int64_t across, int64_t below = 0) const {
    const auto put = [&](int64_t n, int64_t begin, int64_t end) {
      int64_t h = (pixels.begin + begin) / q.out_width, w = (pixels.begin + begin) % q.out_width;
      for (int64_t p = begin; p < end; h++, w = 0) {
        const int64_t stop = min(end, p + q.out_width - w);
        int64_t at = n * image + (h - row) * down + w * across;
        for (; p < stop; p++, at += across) *out++ = at;
      }
    };
    for (int64_t n = 0; n < pixels.images; n++) put(n, 0, pixels.whole + below);
    for (int64_t n = 0; n < pixels.images; n++) put(n, pixels.whole, pixels.pixels);
  }

  // `count` pixels from column `column` of a row of the input, every step-th, with their channels behind one another.
  void pack_pixels(bfloat16* out, const bfloat16* in, int64_t step, int64_t count) const {
    if (q.input_stride[1] == 1 && channels > 1) {
      const int64_t distance = step * q.input_stride[3];
      if (distance == channels) return copy(out, in, count * channels);
      for (int64_t p = 0; p < count; p++) copy(out + p * channels, in + p * distance, channels);
      return;
    }
    if (channels == 1 && step * q.input_stride[3] == 1) return copy(out, in, count);
    if (q.input_stride[3] != 1) {
      for (int64_t p = 0; p < count; p++) out[p] = in[p * step * q.input_stride[3]];
      return;
    }
    alignas(64) bfloat16 planes[kLines * kStep];
    alignas(64) char pairs[kTileBytes];
    for (int64_t p = 0; p < count; p += kStep) {
      const int64_t some = min(kStep, count - p);
      for (int64_t c = 0; c < channels; c += kLines) {
        const int64_t lines = min(kLines, channels - c);
        for (int64_t i = 0; i < lines; i++)
          copy_step(planes + i * kStep, in + (c + i) * q.input_stride[1] + p * step, step, some);
        transpose_tile(reinterpret_cast<const char*>(planes), 64, pairs);
        const __mmask16 lanes = static_cast<__mmask16>(first(lines));
        bfloat16* to = out + p * channels + c;
        for (int64_t i = 0; i < some; i += 2, to += 2 * channels) {
          constexpr u16 order = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
          const u16 both = *reinterpret_cast<const u16_memory*>(pairs + i * 32);
          struct Halves {
            u16_half low, high;
          };
          const auto halves = __builtin_bit_cast(Halves, shuffle(both, both, order));
          _mm256_mask_storeu_epi16(to, lanes, (__m256i)halves.low);
          if (i + 1 < some) _mm256_mask_storeu_epi16(to + channels, lanes, (__m256i)halves.high);
        }
      }
    }
  }
  // Whole vectors are written, and what is too far overwritten by what comes behind.
  static void copy(bfloat16* out, const bfloat16* in, int64_t count) {
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) store_operand(out + i, load_operand(in + i));
    if (i < count) store_operand(out + i, load_first_operand(in + i, static_cast<int>(count - i)));
  }
  // count <= kStep elements, a vector of them written.
  static void copy_step(bfloat16* out, const bfloat16* in, int64_t step, int64_t count) {
    if (step == 1) return store_operand(out, load_first_operand(in, static_cast<int>(count)));
    if (step == 2) {
      const int64_t reach = 2 * count - 1;
      const u16 a = load_first_operand(in, static_cast<int>(min(reach, kStep)));
      const u16 b = load_first_operand(in + min(reach, kStep), static_cast<int>(max(reach - kStep, 0)));
      return store_operand(out, even_lanes(a, b));
    }
    for (int64_t i = 0; i < count; i++) out[i] = in[i * step];
  }
  static void clear(bfloat16* out, int64_t count) {
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) store_operand(out + i, u16{});
    if (i < count) _mm512_mask_storeu_epi16(out + i, first(count - i), __m512i{});
  }

  // (images, rows, columns, channels), padding included.
  void pack_region(bfloat16* out, int64_t region_rows, int64_t region_columns) const {
    const int64_t down = q.kernel[0] == 1 ? q.stride[0] : 1, across = q.kernel[1] == 1 ? q.stride[1] : 1;
    const int64_t top = row * q.stride[0] - q.padding[0], left = -q.padding[1];
    const int64_t low = clamp(ceil_div(-left, across), 0, region_columns);
    const int64_t high = clamp(ceil_div(q.width - left, across), low, region_columns);
    for (int64_t n = 0; n < pixels.images; n++)
      for (int64_t r = 0; r < region_rows; r++, out += region_columns * channels) {
        const int64_t from = top + r * down;
        if (from < 0 || from >= q.height) {
          clear(out, region_columns * channels);
          continue;
        }
        clear(out, low * channels);
        if (high > low)
          pack_pixels(out + low * channels,
                      input_at(pixels.image + n, channel) + from * q.input_stride[2] +
                          (left + low * across) * q.input_stride[3],
                      across, high - low);
        clear(out + high * channels, (region_columns - high) * channels);
      }
  }

  // ---- tiles of lines ----

  int64_t output_of(int64_t tile) const { return grad.begin_of(q.out_per_group, tile); }
  Lines grad_lines(int64_t tile, int64_t tiles) const { return {0, q.out_per_group, tile, tiles}; }

  // Tiles of the input: the first of all runs, then the second of all ...; here neighbours in a run. They begin `base`
  // elements behind the pixels' offsets.
  Lines input_lines(int64_t run, int64_t part, int64_t parts) const {
    const int64_t in_row = q.kernel[1] / layout.taps_in_run(), columns = layout.extent(1, q.out_width);
    const int64_t base = (run / in_row * q.dilation[0] * columns + run % in_row * q.dilation[1]) * channels;
    return {base, layout.taps_in_run() * channels, part, parts};
  }

  char* room_of(bool whole, int64_t tile) const {
    return scratch + (whole ? room.whole + tile * pitch : room.some + (tile - some_begin) * pitch);
  }
  char* input_room(int64_t tile) const {
    const int64_t run = tile % layout.runs();
    return rows_are_alike ? room_of(input_is_whole, tile - run) + run * layout.down() / 2 * 64
                          : room_of(input_is_whole, tile);
  }
  char* grad_room(int64_t tile) const { return room_of(!input_is_whole, tile); }

  void shape(const Matrix& from, bool is_a, const Lines& lines, char* to, int64_t distance) const {
    if (is_a)
      from.to_a(pixels, lines, to, distance);
    else
      from.to_b(pixels, lines, to, distance, reinterpret_cast<bfloat16*>(scratch + room.gathered));
  }
  void shape_grad(int64_t tile, int64_t tiles) const {
    shape(grad, !input_is_a, grad_lines(tile, tiles), grad_room(tile), pitch);
  }
  // `tile` is a multiple of the runs.
  void shape_input(int64_t tile, int64_t tiles) const {
    const int64_t runs = layout.runs(), part = tile / runs, end = min(tile + tiles, input_tiles);
    const int64_t parts = ceil_div(end - tile, runs);
    if (rows_are_alike && parts > 0) {
      const Lines lines = input_lines(0, part, parts);
      const int64_t first_line = part * kLines;
      interleave_pixels(input.from + first_line, input.offsets, pixels.pixels + layout.pixels_below(), 0,
                        min(parts * kLines, lines.lines - first_line), input_room(tile), runs * pitch, false);
    } else if (parts > 0) {
      for (int64_t run = 0; run < runs; run++)
        shape(input, input_is_a, input_lines(run, part, parts), input_room(tile + run), runs * pitch);
    }
    if (tile + tiles > input_tiles)  // the sums of grad_output, for the bias
      for (int64_t i = 0; i < pixels.steps() * kTileBytes; i += 64)
        store_operand(reinterpret_cast<bfloat16*>(room_of(input_is_whole, input_tiles) + i), ones<bfloat16>());
  }

  void add_tile(int64_t tile, bool begins, bool ends) {
    const int64_t out_pixels = q.out_height * q.out_width, in_image = ceil_div(out_pixels, q.tile_pixels);
    pixels.image = tile / in_image * q.tile_images;
    pixels.images = min(q.tile_images, q.batch - pixels.image);
    pixels.begin = tile % in_image * q.tile_pixels;
    pixels.pixels = min(q.tile_pixels, out_pixels - pixels.begin);
    pixels.whole = pixels.pixels / kStep * kStep;
    pitch = pitch_of(pixels.steps());
    row = pixels.begin / q.out_width;
    rows = (pixels.begin + pixels.pixels - 1) / q.out_width - row + 1;

    auto* grad_offsets = reinterpret_cast<int64_t*>(scratch + room.grad_offsets);
    const bfloat16* grad_from = static_cast<const bfloat16*>(q.grad_output) + pixels.image * q.grad_stride[0] +
                                q.runs[0].group * q.out_per_group * q.grad_stride[1];
    grad = {layout.grad_planes(), grad_from, q.grad_stride[1],     q.grad_stride[0],
            grad_offsets,         true,      all_input_tiles() > 4};
    if (grad.adjacent_pixels) {
      grad.from += pixels.begin;
    } else {
      grad.from += row * q.grad_stride[2];
      put_offsets(grad_offsets, q.grad_stride[0], q.grad_stride[2], q.grad_stride[3]);
    }
    auto* input_offsets = reinterpret_cast<int64_t*>(scratch + room.input_offsets);
    int64_t region_columns = 0;
    if (layout.packs()) {
      const int64_t region_rows = layout.extent(0, rows);
      region_columns = layout.extent(1, q.out_width);
      auto* region = reinterpret_cast<bfloat16*>(scratch + room.region);
      pack_region(region, region_rows, region_columns);
      const int64_t line = region_columns * channels;
      rows_are_alike = !input_is_a && layout.rows_alike() && pixels.left() == 0 && layout.down() <= pixels.pixels;
      put_offsets(input_offsets, region_rows * line, layout.step(0) * line, layout.step(1) * channels,
                  rows_are_alike ? layout.pixels_below() : 0);
      input = {false, region, 0, 0, input_offsets, false, false};
    } else {
      input = {layout.input_planes(),  input_at(pixels.image, channel),
               q.input_stride[1],      q.input_stride[0],
               input_offsets,          true,
               layout.grad_tiles() > 4};
      if (input.adjacent_pixels) {
        input.from += pixels.begin;
      } else {
        input.from += row * q.stride[0] * q.input_stride[2];
        put_offsets(input_offsets, q.input_stride[0], q.stride[0] * q.input_stride[2], q.stride[1] * q.input_stride[3]);
      }
    }

    const int64_t whole = input_is_whole ? all_input_tiles() : layout.grad_tiles();
    const int64_t others = input_is_whole ? layout.grad_tiles() : all_input_tiles();
    input_is_whole ? shape_input(0, whole) : shape_grad(0, whole);
    const int64_t group = layout.group(!input_is_whole);
    for (some_begin = 0; some_begin < others; some_begin += group) {
      const int64_t end = min(others, some_begin + group);
      input_is_whole ? shape_grad(some_begin, end - some_begin) : shape_input(some_begin, end - some_begin);
      int64_t is, js;
      for (int64_t i = some_begin; i < end; i += is) {
        is = input_is_whole ? pair_at(i, end) : input_pair_at(i, end);
        for (int64_t j = 0; j < whole; j += js) {
          js = input_is_whole ? input_pair_at(j, whole) : pair_at(j, whole);
          if (input_is_whole)
            multiply_tiles(i, is, j, js, begins, ends);
          else
            multiply_tiles(j, js, i, is, begins, ends);
        }
      }
    }
  }
  static int64_t pair_at(int64_t tile, int64_t end) { return min(2, end - tile); }
  // The tile for the bias lies elsewhere than planes do.
  int64_t input_pair_at(int64_t tile, int64_t end) const {
    return pair_at(tile, input_is_a && tile < input_tiles ? min(end, input_tiles) : end);
  }

  // One or two tiles of grad_output with one or two of the input.
  void multiply_tiles(int64_t u, int64_t us, int64_t t, int64_t ts, bool begins, bool ends) const {
    Segment segments[kPixelsOfMany / kStep + 1];
    int64_t count = 0;
    for (int i = 0; i < (input_is_a ? ts : us); i++) {
      if (!input_is_a)
        count = grad.segments(pixels, grad_lines(u, us), u + i, grad_room(u + i), segments, i);
      else if (t == input_tiles)
        count = Matrix::put(segments, 0, i, room_of(input_is_whole, t), 64, kTileBytes, pixels.steps());
      else
        count = input.segments(pixels, input_lines(0, t, ts), t + i, input_room(t + i), segments, i);
    }
    auto* all_sums = reinterpret_cast<float*>(scratch + room.sums);
    const int64_t as = input_is_a ? ts : us, bs = input_is_a ? us : ts;
    float* sums[4];
    for (int64_t a = 0; a < as; a++)
      for (int64_t b = 0; b < bs; b++) {
        const int64_t at = (u + (input_is_a ? b : a)) * all_input_tiles() + t + (input_is_a ? a : b);
        sums[2 * a + b] = all_sums + (keeps_sums ? at : 2 * a + b) * kTileSums;
      }
    const auto b_at = [&](int64_t b) {
      return input_is_a ? grad_room(u + b) : t + b == input_tiles ? room_of(input_is_whole, t + b) : input_room(t + b);
    };
    const auto call = as == 2   ? bs == 2 ? &multiply<2, 2> : &multiply<2, 1>
                      : bs == 2 ? &multiply<1, 2>
                                : &multiply<1, 1>;
    call(segments, count, b_at(0), b_at(bs - 1), sums, begins ? nullptr : sums);
    if (!ends) return;
    for (int64_t a = 0; a < as; a++)
      for (int64_t b = 0; b < bs; b++) put_result(u + (input_is_a ? b : a), t + (input_is_a ? a : b), sums[2 * a + b]);
  }

  void put_result(int64_t u, int64_t t, const float* sums) const {
    alignas(64) char turned[kTileBytes];
    if (!input_is_a) {
      transpose_tile(reinterpret_cast<const char*>(sums), 64, turned);
      sums = reinterpret_cast<const float*>(turned);
    }
    const int64_t output = output_of(u);
    const int outputs = static_cast<int>(min(kLines, q.out_per_group - output));
    if (t == input_tiles) return store_first(bias + output, load(sums), outputs);
    const int64_t taps = q.kernel[0] * q.kernel[1], lines = layout.taps_in_run() * channels;
    const int64_t run = t % layout.runs(), begin = input.begin_of(lines, t / layout.runs());
    int64_t tap = run * layout.taps_in_run() + begin / channels, c = begin % channels;
    for (int64_t i = 0; i < min(kLines, lines - begin); i++) {
      store_first(partial + ((channel + c) * taps + tap) * q.out_per_group + output, load(sums + i * kLines), outputs);
      if (++c == channels) c = 0, tap++;
    }
  }

  void operator()(int64_t task, float* all_partial) {
    const int64_t range = task % q.ranges, slice = task / q.ranges;
    partial = all_partial + slice * q.selected * q.out_per_group * q.kernel[0] * q.kernel[1];
    bias = q.with_bias && range == 0 ? static_cast<float*>(q.bias) + slice * q.out_per_group : nullptr;
    channel = range * q.range_channels;
    channels = min(q.range_channels, q.selected - channel);
    input_tiles = layout.input_tiles(channels);
    keeps_sums = layout.tiles_in_slice() > 1;
    // What lies in form A stays; otherwise the smaller matrix is transposed.
    const bool more_input = input_tiles > layout.grad_tiles();
    input_is_whole = layout.input_tiles(q.range_channels) + q.with_bias <= layout.grad_tiles();
    input_is_a = layout.grad_planes() ? layout.input_planes() && more_input : layout.input_planes() || !more_input;
    const int64_t begin = q.tiles * slice / q.slices, end = q.tiles * (slice + 1) / q.slices;
    for (int64_t tile = begin; tile < end; tile++) add_tile(tile, tile == begin, tile + 1 == end);
  }
};
#endif

}  // namespace

bool conv2d_channel_grad_amx_plan([[maybe_unused]] Conv2dChannelGrad& q) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  constexpr int64_t kTasks = 16, kTaskCycles = 25000, kPartialElements = 1 << 20;
  const Layout layout{q};
  if (q.dtype != Dtype::bfloat16 || q.run_count != 1 || q.out_per_group < 8 || !layout.readable()) return false;
  const int64_t pixels = q.out_height * q.out_width;
  if (q.batch * pixels < kStep) return false;
  const int64_t sums = layout.grad_tiles() * min(layout.input_tiles(q.selected), kMaxInputTiles) * kTileSums;
  const int64_t most_pixels = sums > kManySums ? kPixelsOfMany : kPixels;
  if (pixels <= most_pixels) {
    const int64_t images = clamp(most_pixels / pixels, 1, q.batch);
    q.tile_images = ceil_div(q.batch, ceil_div(q.batch, images));
    q.tile_pixels = pixels;
  } else {
    q.tile_images = 1;
    q.tile_pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, most_pixels)), kStep) * kStep;
  }
  q.tiles = ceil_div(q.batch, q.tile_images) * ceil_div(pixels, q.tile_pixels);

  // Ranges of channels, each of which reads all of grad_output. Whole tiles of them.
  const auto channels_of = [&](int64_t ranges) {
    const int64_t channels = ceil_div(q.selected, ranges);
    return min(q.selected, ceil_div(channels, kLines) * kLines);
  };
  const auto fits = [&](int64_t channels) {
    return layout.input_tiles(channels) <= kMaxInputTiles && layout.region(channels) <= kMaxRegion;
  };
  int64_t least = 1;
  while (channels_of(least) > kLines && !fits(channels_of(least))) least++;
  if (layout.region(channels_of(least)) > kMaxRegion) return false;
  // Of a step of a tile of grad_output: tiles of 16 cycles, and 1 KB that is read.
  const int64_t cycles =
      q.tiles * layout.most_steps() * layout.grad_tiles() * (layout.input_tiles(q.selected) * 16 + 100);
  const int64_t tasks = clamp(cycles / kTaskCycles, 1, kTasks);
  const int64_t elements = q.selected * q.out_per_group * q.kernel[0] * q.kernel[1];
  // A slice writes all results once more, at about one a cycle: that may be a sixth of the work.
  const int64_t most = cycles / 6 / elements;
  q.slices = clamp(min(tasks, min(most, kPartialElements / elements)), 1, q.tiles);
  // Reading grad_output once more is worth it for so many tiles of the input; for less up to 4 tasks, for their
  // threads.
  constexpr int64_t kRangeTiles = 24, kLeastRangeTiles = 8;
  const int64_t input_tiles = layout.input_tiles(q.selected);
  const int64_t ranges = max(input_tiles / kRangeTiles, min(4 / q.slices, input_tiles / kLeastRangeTiles));
  q.range_channels = channels_of(max(least, min(tasks / q.slices, max(ranges, 1))));
  q.ranges = ceil_div(q.selected, q.range_channels);
  q.tasks = q.slices * q.ranges;
  q.sum_stride[3] = q.out_per_group;
  q.sum_stride[2] = q.kernel[1] * q.sum_stride[3];
  q.sum_stride[1] = 1;
  q.sum_stride[0] = q.kernel[0] * q.sum_stride[2];
  q.scratch = ceil_div(Room(layout).bytes, 4);
  return true;
#else
  return false;
#endif
}

void conv2d_channel_grad_amx([[maybe_unused]] const Conv2dChannelGrad& q, [[maybe_unused]] int64_t task,
                             [[maybe_unused]] void* partial, [[maybe_unused]] void* scratch) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  const Tiles tiles;
  Task(q, scratch)(task, static_cast<float*>(partial));
#endif
}

}  // namespace trady::TRADY_ISA
