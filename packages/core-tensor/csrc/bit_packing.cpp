// Little-endian bit stream per row: code j occupies bits [j*bits, (j+1)*bits) and may straddle two 32-bit words.
#include "core.h"

namespace {

CT_CLONES void pack_row(const uint8_t* codes, uint32_t* words, int64_t columns, int bits) {
  uint64_t pending = 0;  // bits not yet written, lowest first
  int held = 0;
  for (int64_t j = 0; j < columns; ++j) {
    pending |= static_cast<uint64_t>(codes[j]) << held;
    held += bits;
    if (held >= 32) {
      *words++ = static_cast<uint32_t>(pending);
      pending >>= 32;
      held -= 32;
    }
  }
  if (held > 0) *words = static_cast<uint32_t>(pending);
}

CT_CLONES void unpack_row(const uint32_t* words, uint8_t* codes, int64_t columns, int bits) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t pending = 0;
  int held = 0;
  for (int64_t j = 0; j < columns; ++j) {
    if (held < bits) {
      pending |= static_cast<uint64_t>(*words++) << held;
      held += 32;
    }
    codes[j] = static_cast<uint8_t>(pending & mask);
    pending >>= bits;
    held -= bits;
  }
}

}  // namespace

CT_EXPORT void ct_pack_bits(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t columns,
                            int64_t words_per_row, int bits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) pack_row(codes + i * columns, words + i * words_per_row, columns, bits);
}

CT_EXPORT void ct_unpack_bits(const uint32_t* words, uint8_t* codes, int64_t rows, int64_t columns,
                              int64_t words_per_row, int bits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) unpack_row(words + i * words_per_row, codes + i * columns, columns, bits);
}
