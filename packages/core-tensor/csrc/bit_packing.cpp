// Little-endian bit stream per row: code j occupies bits [j*bits, (j+1)*bits) and may straddle two 32-bit words.
//
// Eight codes of `bits` bits are exactly `bits` bytes, so a row is taken eight codes at a time in one 64-bit register:
// neighbors are pushed together in three steps (bytes, pairs, quadruples). Little-endian machines only, as torch's own.
#include <cstring>

#include "core.h"

namespace {

CT_INLINE uint64_t compress(uint64_t x, int bits) {  // eight bytes to eight adjacent fields
  const int gap = 8 - bits;
  x = (x & 0x00FF00FF00FF00FFu) | ((x & 0xFF00FF00FF00FF00u) >> gap);
  x = (x & 0x0000FFFF0000FFFFu) | ((x & 0xFFFF0000FFFF0000u) >> (2 * gap));
  return (x & 0x00000000FFFFFFFFu) | ((x & 0xFFFFFFFF00000000u) >> (4 * gap));
}

CT_INLINE uint64_t expand(uint64_t x, int bits) {  // its inverse; bits above 8 * `bits` are ignored
  const int gap = 8 - bits;
  const uint64_t quad = (uint64_t{1} << (4 * bits)) - 1, pair = ((uint64_t{1} << (2 * bits)) - 1) * 0x100000001u,
                 one = ((uint64_t{1} << bits) - 1) * 0x0001000100010001u;
  x = (x & quad) | ((x << (4 * gap)) & (quad << 32));
  x = (x & pair) | ((x << (2 * gap)) & (pair << 16));
  return (x & one) | ((x << gap) & (one << 8));
}

// Returns all bits that stand in any eight codes.
uint64_t pack_row(const uint8_t* codes, uint8_t* bytes, int64_t columns, int64_t row_bytes, int bits) {
  if (row_bytes == 0) return 0;
  uint64_t seen = 0;
  std::memset(bytes + row_bytes - 4, 0, 4);
  for (int64_t j = 0; j < columns; j += 8, bytes += bits, row_bytes -= bits) {
    uint64_t x = 0;
    std::memcpy(&x, codes + j, columns - j < 8 ? columns - j : 8);
    seen |= x;
    x = compress(x, bits);
    std::memcpy(bytes, &x, row_bytes >= 8 ? 8 : row_bytes < bits ? row_bytes : bits);  // the next eight overwrite
  }
  return seen;
}

void unpack_row(const uint8_t* bytes, uint8_t* codes, int64_t columns, int64_t row_bytes, int bits) {
  for (int64_t j = 0; j < columns; j += 8, bytes += bits, row_bytes -= bits) {
    uint64_t x = 0;
    std::memcpy(&x, bytes, row_bytes < 8 ? row_bytes : 8);
    x = expand(x, bits);
    std::memcpy(codes + j, &x, columns - j < 8 ? columns - j : 8);
  }
}

}  // namespace

// Returns 1, or 0 if a code has more bits.
CT_EXPORT int ct_pack_bits(const uint8_t* codes, uint8_t* words, int64_t rows, int64_t columns, int64_t words_per_row,
                            int bits, int threads) {
  const int64_t row_bytes = 4 * words_per_row;
  uint64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : seen)
  for (int64_t i = 0; i < rows; ++i)
    seen |= pack_row(codes + i * columns, words + i * row_bytes, columns, row_bytes, bits);
  const uint64_t allowed = ((uint64_t{1} << bits) - 1) * 0x0101010101010101u;
  return (seen & ~allowed) == 0;
}

CT_EXPORT void ct_unpack_bits(const uint8_t* words, uint8_t* codes, int64_t rows, int64_t columns,
                              int64_t words_per_row, int bits, int threads) {
  const int64_t row_bytes = 4 * words_per_row;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) unpack_row(words + i * row_bytes, codes + i * columns, columns, row_bytes, bits);
}
