#include "core/format.h"

#include <bit>
#include <cstring>

namespace flexq {
namespace {

static_assert(std::endian::native == std::endian::little, "the 8x8 bit transposes below read bytes in little-endian");

// Transposes an 8x8 bit matrix held one row a byte (Hacker's Delight, section 7-3).
uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000cccc0000ccccull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ull;
  return x ^ t ^ (t << 28);
}

}  // namespace

void pack_group(int bits, const int8_t* codes, uint8_t* planes) {
  for (int byte = 0; byte < kPlaneBytes; ++byte) {
    uint64_t x;
    std::memcpy(&x, codes + 8 * byte, 8);
    x = transpose_bits(x);
    for (int p = 0; p < bits; ++p) planes[p * kPlaneBytes + byte] = static_cast<uint8_t>(x >> (8 * p));
  }
}

void unpack_group(int bits, const uint8_t* planes, int8_t* codes) {
  // The top plane is the sign: repeat it in the bits above. With all eight planes there are none.
  const uint64_t above = 0x0101010101010100ull << (8 * (bits - 1));
  for (int byte = 0; byte < kPlaneBytes; ++byte) {
    uint64_t x = 0;
    for (int p = 0; p < bits; ++p) x |= static_cast<uint64_t>(planes[p * kPlaneBytes + byte]) << (8 * p);
    x |= (x >> (8 * (bits - 1))) * above;
    x = transpose_bits(x);
    std::memcpy(codes + 8 * byte, &x, 8);
  }
}

}  // namespace flexq
