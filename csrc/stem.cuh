// y = max_pool(relu(conv(normalise(frames)) + bias)): the first layer of a pathway from raw or normalised frames, in
// one launch. Convolution (kTaps, 7, 7) with stride (1, 2, 2) and padding (kTaps / 2, 3, 3), pooling (1, 3, 3) with
// stride (1, 2, 2) and padding (0, 1, 1). Accumulates in float32 and rounds once, before the pooling, which is exact.
//
// A block makes 8 x 16 pooled pixels of kChannels channels and walks over time. It holds one frame of the input in
// shared memory, normalised, 3 channels dense; each frame is read once and multiplied with all kTaps temporal taps side
// by side, into the sums of the kTaps output frames that see it, which move on by one with each frame. So a tap of one
// frame is an implicit GEMM of 17 x 33 convolution pixels (36 fragments of 16; the pooling's halo is computed by both
// neighbours, 12 % more products) x kTaps * kChannels columns x 7 filter rows.
//
// A filter row takes 24 places of the reduction: 7 pixels x 3 channels and 3 zeros (7 rows are 168 places, 176 with the
// end of the last instruction, for 147 products). Convolution pixels are 6 elements apart and rows even, so a register
// of an A fragment is one aligned 32-bit load; 24 places are whole 16-byte halves, so all offsets are constants. Zeroed
// places of A too, or a NaN right of the window would spread.
//
// Bank conflicts of the 16-bit types: none in the fragments of the patch (lane 4g + t reads word 3g + t; where a
// fragment wraps to the next row, the pitch makes that 3g + t + 1), none in those of the weights (consecutive 8-byte
// words), none in writing and pooling 32 channels, two-way in pooling 8 and in filling the patch (6-byte pixels).
// Float32 is two-way in the patch (word 6g + t).
//
// Global memory: the tile's patch is 39 x 71 pixels for 32 x 64 of stride, so L1 and L2 serve 1.35 x the clip, times
// (chunk + kTaps - 1) / chunk where the clip is cut in time, and for each tile of channels (two for 64) again; memory
// is read once as long as L2 holds a row of tiles. For 32 raw frames of 256 x 256 and 8 of them for the Slow pathway,
// in 16-bit types: Fast 6.3 MB in and 2.1 MB out, from L2 8.5 MB whole and 12.8 MB in chunks of 8 frames; Slow 1.6 MB
// in, 4.2 MB out, from L2 4.3 MB. Stores are 16 bytes, and together fill 32-byte sectors.
//
// A block of 384 threads has up to 168 registers a thread (97 to 168 used) and is alone on its multiprocessor, so it
// reads the next frame during the products of one. Shared memory: 72 KiB for 32 channels, 40 KiB for the 5 taps of 8;
// float32 96 KiB for 16 channels, 77 KiB.
#pragma once

#include <cstring>

#include "conv3d_bn_relu.cuh"

namespace slowfast_ext {

// Sizes, and strides in elements.
struct StemParameters {
  const void* x;
  const void* weight;  // (channels, kernel_t, 7, 7, 3), dense
  const float* bias;   // (channels) or null
  const float* scale;  // (3) or null: pixels are normalised to pixel * scale + shift
  const float* shift;  // (3) or null
  const void* frames;  // out_t indices of frames of x, or null for all; one outside of x makes a frame of NaN
  void* y;             // pixels of y_pitch elements
  int64_t x_stride_n, x_stride_c, x_stride_t, x_stride_h, x_stride_w;
  int64_t y_pitch;
  int batch, in_t, in_h, in_w;
  int channels, kernel_t;
  int conv_h, conv_w;
  int out_t, out_h, out_w;
  int chunk;          // output frames of a block
  bool bytes;         // x is uint8, else of the type of weight
  bool long_indices;  // frames are int64, else int32
  bool vector;        // y can be written 16 bytes at a time
};

template <typename Element_, int kTaps_, int kChannels_>
struct StemTile {
  using Element = Element_;
  static constexpr int kBytes = sizeof(Element);
  static constexpr int kTaps = kTaps_, kChannels = kChannels_, kOctets = kChannels / 8;
  static constexpr int kHeight = 8, kWidth = 16;  // pooled pixels
  static constexpr int kConvHeight = 2 * kHeight + 1, kConvWidth = 2 * kWidth + 1;
  static constexpr int kConvPixels = kConvHeight * kConvWidth;
  static constexpr int kPatchHeight = 2 * kConvHeight + 5, kPatchWidth = 2 * kConvWidth + 5;
  static constexpr int kPatchPixels = kPatchHeight * kPatchWidth;
  static constexpr int kThreads = 384, kFragments = 3;            // 12 warps of 3 x 16 convolution pixels
  static constexpr bool kLoadsAhead = kBytes == 2 || kTaps == 1;  // else there are too few registers

  // The reduction over one frame, counted in halves: the 16 bytes of it that one register of a fragment spans.
  static constexpr int kFilter = 7, kRowElements = 21, kRowPlaces = 24;
  static constexpr int kRowHalves = kRowPlaces * kBytes / 16, kHalves = kFilter * kRowHalves;
  static constexpr int kSlices = (kHalves + 1) / 2, kSlicePlaces = 32 / kBytes;
  static constexpr int kUnrolled = kBytes == 2 ? kSlices : 1;  // slices; each more needs registers
  static constexpr int kColumns = kTaps * kOctets;             // groups of 8 columns; the newest output frame last

  static constexpr int kPixelWords = 6 * kBytes / 4;           // between convolution pixels
  static constexpr int kPatchPitch = kBytes == 2 ? 114 : 216;  // words
  static constexpr int kPatchBytes = kPatchHeight * kPatchPitch * 4;
  static constexpr int kWeightBytes = kSlices * kColumns * 32 * sizeof(uint2);
  static constexpr int kStagePitch = (kChannels + (kChannels > 8 ? 8 : 0)) * kBytes;
  static constexpr int kStageBytes = kConvPixels * kStagePitch;
  static constexpr int kSharedBytes = kWeightBytes + kStageBytes + kPatchBytes;

  static_assert(kThreads / 32 * kFragments * 16 >= kConvPixels, "every convolution pixel has a place in a fragment");
  static_assert(kPatchPitch >= (kConvWidth - 1) * kPixelWords + kRowPlaces * kBytes / 4, "a row holds its last window");
  static_assert(kSharedBytes <= 99 * 1024, "what every GPU of compute capability 8.0 and more gives when asked");
};

// Brings frames into the patch in two steps: load() starts the reads of one frame into registers, to be under way while
// the one before is multiplied, and store() normalises them. A thread has one column of every kStep-th row.
template <typename Pixel, typename Tile>
class PatchLoader {
 public:
  using Element = typename Tile::Element;

  __device__ __forceinline__ PatchLoader(const StemParameters& p, int n, int first_y, int first_x)
      : p_(p), row_(threadIdx.x / Tile::kPatchWidth), column_(threadIdx.x % Tile::kPatchWidth), y_(first_y + row_) {
    const int x = first_x + column_;
    column_inside_ = static_cast<unsigned>(x) < unsigned(p.in_w) && row_ < kStep;
    clip_ = static_cast<const Pixel*>(p.x) + n * p.x_stride_n + y_ * p.x_stride_h + x * p.x_stride_w;
  }

  __device__ __forceinline__ void load(int frame) {
    int64_t index = frame;
    if (p_.frames) {
      index = p_.long_indices ? static_cast<const int64_t*>(p_.frames)[frame]
                              : static_cast<const int32_t*>(p_.frames)[frame];
    }
    exists_ = index >= 0 && index < p_.in_t;
    if (!exists_) return;
    const Pixel* image = clip_ + index * p_.x_stride_t;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!inside(i)) continue;
      const Pixel* source = image + i * kStep * p_.x_stride_h;
#pragma unroll
      for (int c = 0; c < 3; ++c) raw_[i][c] = source[c * p_.x_stride_c];
    }
  }

  // Padding is zero after normalisation.
  __device__ __forceinline__ void store(uint32_t* patch) const {
    if (row_ >= kStep) return;
    Element* to = reinterpret_cast<Element*>(patch + row_ * Tile::kPatchPitch) + column_ * 3;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const float scale = p_.scale ? p_.scale[c] : 1.f, shift = p_.shift ? p_.shift[c] : 0.f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row_ + i * kStep >= Tile::kPatchHeight) continue;
        float value = 0.f;
        if (inside(i)) value = exists_ ? as_float(raw_[i][c]) * scale + shift : ptx::bits_to_float(0x7fffffffu);
        to[i * kStep * (Tile::kPatchPitch * 4 / Tile::kBytes) + c] = from_float<Element>(value);
      }
    }
  }

 private:
  static constexpr int kStep = Tile::kThreads / Tile::kPatchWidth;
  static constexpr int kRows = (Tile::kPatchHeight + kStep - 1) / kStep;

  static __device__ __forceinline__ float as_float(uint8_t value) { return static_cast<float>(value); }
  static __device__ __forceinline__ float as_float(Element value) { return to_float(value); }
  __device__ __forceinline__ bool inside(int i) const {
    return column_inside_ && row_ + i * kStep < Tile::kPatchHeight &&
           static_cast<unsigned>(y_ + i * kStep) < unsigned(p_.in_h);
  }

  const StemParameters& p_;
  const Pixel* clip_;
  const int row_, column_, y_;
  bool column_inside_, exists_ = false;
  Pixel raw_[kRows][3];
};

// All taps of kChannels filters in the order of the fragments: for each slice, column and lane its two registers.
template <typename Tile>
__device__ __forceinline__ void load_stem_weights(const StemParameters& p, int first_channel, unsigned char* weights) {
  using Element = typename Tile::Element;
  constexpr int kPlaces = Tile::kSlices * Tile::kSlicePlaces, kPlacesPerWord = 4 / Tile::kBytes;
  for (int i = threadIdx.x; i < Tile::kColumns * 8 * kPlaces; i += Tile::kThreads) {
    const int place = i % kPlaces, column = i / kPlaces / 8, member = i / kPlaces % 8;
    const int row = place / Tile::kRowPlaces, element = place % Tile::kRowPlaces;
    const int tap = Tile::kTaps - 1 - column / Tile::kOctets;
    const int channel = first_channel + column % Tile::kOctets * 8 + member;
    Element value = from_float<Element>(0.f);
    if (channel < p.channels && row < Tile::kFilter && element < Tile::kRowElements) {
      const int64_t source = (int64_t(channel) * Tile::kTaps + tap) * Tile::kFilter + row;
      value = static_cast<const Element*>(p.weight)[source * Tile::kRowElements + element];
    }
    const int word = place / kPlacesPerWord, half = word / 4, lane = member * 4 + word % 4;
    const int registers = ((half / 2 * Tile::kColumns + column) * 32 + lane) * 2 + half % 2;
    reinterpret_cast<Element*>(weights)[registers * kPlacesPerWord + place % kPlacesPerWord] = value;
  }
}

// One warp's share of a tile: fragments of 16 convolution pixels, counted along the rows of the tile.
template <typename Math, typename Tile>
class StemWarp {
 public:
  using Element = typename Math::Element;

  __device__ __forceinline__ StemWarp(const StemParameters& p, int first_channel, int first_y, int first_x)
      : p_(p), lane_(threadIdx.x % 32), first_channel_(first_channel) {
#pragma unroll
    for (int row = 0; row < 2 * Tile::kFragments; ++row) {
      const int pixel = conv_pixel(row), y = pixel / Tile::kConvWidth, x = pixel % Tile::kConvWidth;
      const bool inside = static_cast<unsigned>(first_y + y) < unsigned(p.conv_h) &&
                          static_cast<unsigned>(first_x + x) < unsigned(p.conv_w);
      inside_ |= unsigned(inside) << row;
      const int window = pixel < Tile::kConvPixels ? y * 2 * Tile::kPatchPitch + x * Tile::kPixelWords : 0;
      window_[row] = window + lane_ % 4;
    }
    // The last half of a filter row begins within the row and ends with zeros.
    const int kept = Tile::kRowElements - (Tile::kRowPlaces - 16 / Tile::kBytes) - lane_ % 4 * (4 / Tile::kBytes);
    last_half_ = kept * Tile::kBytes >= 4 ? ~0u : kept > 0 ? 0xffffu : 0u;
  }

  // Adds what the frame in the patch gives to each of the output frames that see it.
  __device__ __forceinline__ void multiply(const uint32_t* patch, const uint2* weights) {
#pragma unroll(Tile::kUnrolled)
    for (int slice = 0; slice < Tile::kSlices; ++slice) {
      uint32_t a[Tile::kFragments][4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int half = slice * 2 + i, column = half % Tile::kRowHalves;
        if (half >= Tile::kHalves) continue;
        const int offset = half / Tile::kRowHalves * Tile::kPatchPitch + column * 4;
        const uint32_t kept = column == Tile::kRowHalves - 1 ? last_half_ : ~0u;
#pragma unroll
        for (int row = 0; row < 2 * Tile::kFragments; ++row) {
          a[row / 2][i * 2 + row % 2] = patch[window_[row] + offset] & kept;
        }
      }
      uint32_t b[Tile::kColumns][2];
#pragma unroll
      for (int column = 0; column < Tile::kColumns; ++column) {
        const uint2 words = weights[(slice * Tile::kColumns + column) * 32 + lane_];
        b[column][0] = words.x, b[column][1] = words.y;
      }
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
        for (int column = 0; column < Tile::kColumns; ++column) Math::multiply(sum_[i][column], a[i], b[column]);
      }
    }
  }

  // Writes the oldest output frame for pooling; what lies outside of the convolution's output is zero there, which
  // never exceeds a ReLU.
  __device__ __forceinline__ void stage(unsigned char* stage) const {
#pragma unroll
    for (int octet = 0; octet < Tile::kOctets; ++octet) {
      const int channel = octet * 8 + lane_ % 4 * 2;
      const bool biased = p_.bias && first_channel_ + channel < p_.channels;
      const float first_bias = biased ? p_.bias[first_channel_ + channel] : 0.f;
      const float second_bias = biased ? p_.bias[first_channel_ + channel + 1] : 0.f;
#pragma unroll
      for (int row = 0; row < 2 * Tile::kFragments; ++row) {
        const int pixel = conv_pixel(row);
        if (pixel >= Tile::kConvPixels) continue;
        float first = sum_[row / 2][octet][row % 2 * 2] + first_bias;
        float second = sum_[row / 2][octet][row % 2 * 2 + 1] + second_bias;
        first = first < 0.f || !(inside_ >> row & 1) ? 0.f : first;  // written so that NaN stays NaN
        second = second < 0.f || !(inside_ >> row & 1) ? 0.f : second;
        *reinterpret_cast<ElementPair<Element>*>(stage + pixel * Tile::kStagePitch + channel * Tile::kBytes) = {
            from_float<Element>(first), from_float<Element>(second)};
      }
    }
  }

  // The sums move on to the next output frame.
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
      for (int column = 0; column < Tile::kColumns; ++column) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool newest = column + Tile::kOctets >= Tile::kColumns;
          sum_[i][column][j] = newest ? 0.f : sum_[i][newest ? 0 : column + Tile::kOctets][j];
        }
      }
    }
  }

 private:
  // Of row 8 * row + lane / 4 of the warp's fragments.
  __device__ __forceinline__ int conv_pixel(int row) const {
    return (threadIdx.x / 32 * Tile::kFragments * 2 + row) * 8 + lane_ / 4;
  }

  const StemParameters& p_;
  const int lane_, first_channel_;
  unsigned inside_ = 0;
  uint32_t last_half_;
  int window_[2 * Tile::kFragments];
  float sum_[Tile::kFragments][Tile::kColumns][4] = {};
};

template <typename Tile>
__device__ __forceinline__ void pool(const StemParameters& p, const unsigned char* stage, int64_t frame, int first_y,
                                     int first_x, int first_channel) {
  using Element = typename Tile::Element;
  constexpr int kChunks = Tile::kChannels * Tile::kBytes / 16, kChunk = 16 / Tile::kBytes;
  for (int i = threadIdx.x; i < Tile::kHeight * Tile::kWidth * kChunks; i += Tile::kThreads) {
    const int chunk = i % kChunks, row = i / kChunks / Tile::kWidth, place = i / kChunks % Tile::kWidth;
    // 16-bit types: pixels 0, 2, 1, 3, as two neighbours of 4 chunks would meet in the banks, see above.
    const int column = Tile::kBytes == 2 ? (place & ~3) + place % 2 * 2 + place / 2 % 2 : place;
    const int y = first_y + row, x = first_x + column, channel = first_channel + chunk * kChunk;
    if (y >= p.out_h || x >= p.out_w || channel >= p.channels) continue;

    const unsigned char* window = stage + (2 * row * Tile::kConvWidth + 2 * column) * Tile::kStagePitch + chunk * 16;
    uint4 largest = *reinterpret_cast<const uint4*>(window);
#pragma unroll
    for (int j = 1; j < 9; ++j) {
      const int offset = (j / 3 * Tile::kConvWidth + j % 3) * Tile::kStagePitch;
      const uint4 value = *reinterpret_cast<const uint4*>(window + offset);
      largest.x = ptx::max_nan(largest.x, value.x, Element{});
      largest.y = ptx::max_nan(largest.y, value.y, Element{});
      largest.z = ptx::max_nan(largest.z, value.z, Element{});
      largest.w = ptx::max_nan(largest.w, value.w, Element{});
    }
    Element* to = static_cast<Element*>(p.y) + ((frame * p.out_h + y) * p.out_w + x) * p.y_pitch + channel;
    if (p.vector) {
      *reinterpret_cast<uint4*>(to) = largest;
    } else {
      Element values[kChunk];
      memcpy(values, &largest, sizeof(values));
#pragma unroll
      for (int c = 0; c < kChunk; ++c) to[c] = values[c];
    }
  }
}

template <typename Math, typename Pixel, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) stem_kernel(const StemParameters p) {
  SHARED_MEMORY(shared);
  unsigned char* const weights = shared;
  unsigned char* const stage = weights + Tile::kWeightBytes;
  uint32_t* const patch = reinterpret_cast<uint32_t*>(stage + Tile::kStageBytes);

  // Blocks that share pixels are neighbours.
  const int channel_tiles = (p.channels + Tile::kChannels - 1) / Tile::kChannels;
  const int tiles_x = (p.out_w + Tile::kWidth - 1) / Tile::kWidth;
  const int tiles_y = (p.out_h + Tile::kHeight - 1) / Tile::kHeight, chunks = (p.out_t + p.chunk - 1) / p.chunk;
  int block = blockIdx.x;
  const int first_channel = block % channel_tiles * Tile::kChannels;
  block /= channel_tiles;
  const int first_x = block % tiles_x * Tile::kWidth;
  block /= tiles_x;
  const int first_y = block % tiles_y * Tile::kHeight;
  block /= tiles_y;
  const int first_frame = block % chunks * p.chunk, end_frame = min(first_frame + p.chunk, p.out_t);
  const int n = block / chunks;

  // A pooled pixel begins one convolution pixel before twice its place, and that three pixels before twice its own.
  PatchLoader<Pixel, Tile> loader(p, n, 4 * first_y - 5, 4 * first_x - 5);
  StemWarp<Math, Tile> warp(p, first_channel, 2 * first_y - 1, 2 * first_x - 1);
  constexpr int kReach = Tile::kTaps / 2;
  const int last_frame = min(end_frame + kReach, p.out_t) - 1;

  if (Tile::kLoadsAhead) loader.load(max(first_frame - kReach, 0));
  load_stem_weights<Tile>(p, first_channel, weights);
  for (int frame = first_frame - kReach; frame < end_frame + kReach; ++frame) {
    const bool exists = frame >= 0 && frame <= last_frame;  // else it is padding, which adds nothing
    if (exists) {
      if (!Tile::kLoadsAhead) loader.load(frame);
      loader.store(patch);
    }
    __syncthreads();  // the patch is whole, and all have pooled the frame before
    if (exists) {
      if (Tile::kLoadsAhead && frame < last_frame) loader.load(frame + 1);
      warp.multiply(patch, reinterpret_cast<const uint2*>(weights));
    }
    const int finished = frame - kReach;
    if (finished >= first_frame) warp.stage(stage);
    warp.advance();
    __syncthreads();  // the stage is whole, and all are done with the patch
    if (finished >= first_frame) {
      pool<Tile>(p, stage, int64_t(n) * p.out_t + finished, first_y, first_x, first_channel);
    }
  }
}

// The chunk that is done first: blocks run in waves of one a multiprocessor, each as long as the frames it multiplies
// and about one more for its weights.
inline int choose_chunk(int64_t tiles, int frames, int kernel_t, int multiprocessors) {
  int best = frames;
  int64_t least = INT64_MAX;
  for (int chunk = frames; chunk > 0; --chunk) {
    const int64_t blocks = tiles * ((frames + chunk - 1) / chunk);
    const int64_t time = (blocks + multiprocessors - 1) / multiprocessors * (chunk + kernel_t);
    if (time < least) best = chunk, least = time;
  }
  return best;
}

template <typename Math, typename Pixel, int kTaps, int kChannels>
void launch_stem_tile(StemParameters p, int multiprocessors, cudaStream_t stream) {
  using Tile = StemTile<typename Math::Element, kTaps, kChannels>;
  const int64_t tiles = int64_t(p.batch) * ((p.out_h + Tile::kHeight - 1) / Tile::kHeight) *
                        ((p.out_w + Tile::kWidth - 1) / Tile::kWidth) *
                        ((p.channels + Tile::kChannels - 1) / Tile::kChannels);
  if (p.chunk == 0) p.chunk = choose_chunk(tiles, p.out_t, p.kernel_t, multiprocessors);
  const auto kernel = stem_kernel<Math, Pixel, Tile>;
  // A failure shows in the launch.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  launch_kernel(kernel, unsigned(tiles * ((p.out_t + p.chunk - 1) / p.chunk)), Tile::kThreads, Tile::kSharedBytes,
                stream, p);
}

template <typename Math, typename Pixel>
void launch_stem_pixels(const StemParameters& p, int multiprocessors, cudaStream_t stream) {
  constexpr int kSlowChannels = sizeof(typename Math::Element) == 2 ? 32 : 16;
  if (p.kernel_t == 1) {
    launch_stem_tile<Math, Pixel, 1, kSlowChannels>(p, multiprocessors, stream);
  } else {
    launch_stem_tile<Math, Pixel, 5, 8>(p, multiprocessors, stream);
  }
}

// kernel_t is 1 or 5; a chunk of 0 is chosen here.
template <typename Math>
void launch_stem(const StemParameters& p, int multiprocessors, cudaStream_t stream) {
  if (p.bytes) {
    launch_stem_pixels<Math, uint8_t>(p, multiprocessors, stream);
  } else {
    launch_stem_pixels<Math, typename Math::Element>(p, multiprocessors, stream);
  }
}

}  // namespace slowfast_ext
