// Linear layers by table lookup: for each block of inputs a table of its products with all words of the codebook, from
// which every output then takes the entry that its code names. Products are rounded to 16 bits, and added up exactly.
// Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_LOOKUP_H_
#define VQONNX_LOOKUP_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "weight.h"

namespace vqonnx {

// The weight's codes in the order in which lookups read them, and its codebooks in 16 bits. Codes of up to 4 bits
// are joined to longer ones where that is possible; a block is then that of all of them.
//
// A column of the weight is a tap and an input, inputs running fastest; all taps of an input share its tables. Sets of
// kSetRows outputs of one tap are looked up together, and tiles of up to kMostSets sets; the sets of a tap class are
// consecutive: those are taps that the same inputs may need. Inputs come in chunks of up to kTableBlocks tables. Codes:
// [chunk][tile][stage][block][set of the tile][kSetRows]. Strips are read where they are stored.
class Lookup {
 public:
  // `tap_class` is the class of each tap, counted from 0. The codes are read now; what is kept of them is a copy.
  Lookup(const Weight& weight, const std::uint8_t* codes, const std::vector<std::size_t>& tap_class,
         const Kernels& kernels);

  // Whether there can be tables at all for blocks that do not cross taps.
  static bool Possible(const Weight& weight, std::size_t taps, const Kernels& kernels);

  // What they would take, about, measured on Zen 5, for a layer that for each output position makes the tables of so
  // many input positions and looks up so many taps.
  static double Cycles(const Weight& weight, std::size_t taps, double positions, double lookups);

  struct Chunk {
    std::size_t first_block, blocks;  // of inputs; each has `stages` tables
    const std::uint8_t* codes;        // its own, or all those stored
  };
  std::size_t chunks() const { return (tap_blocks_ - 1) / chunk_blocks_ + 1; }
  Chunk At(std::size_t chunk, const std::uint8_t* stored) const;

  // Room for the tables of a chunk.
  std::size_t table_bytes() const { return stages_ * chunk_blocks_ * kTableBytes; }
  std::size_t chunk_values() const { return chunk_blocks_ * even_width_; }

  // Rounds the inputs [first_block * width, ..) of a chunk, `x` being the first of them and `inputs` how many there are
  // in all, to chunk_values() integers.
  struct Rounded {
    float factor;  // what a unit of the tables is worth
    float most;    // the largest magnitude of the inputs; infinite where one is no number
  };
  Rounded Round(const Chunk& chunk, const float* x, std::size_t inputs, std::int16_t* rounded) const;

  void Build(const Chunk& chunk, const std::int16_t* rounded, std::uint8_t* tables) const;

  // For each set of a tile kSetRows sums, added to what is there if `add`, in an order of their own until Sort.
  struct Tile {
    std::size_t first_set, sets;
  };
  struct Class {
    std::size_t first_tile, tiles;
  };
  // `next`: what will be asked for then, of which the codes are fetched early.
  struct Next {
    std::size_t tile, first_block;
  };
  void Sum(const Chunk& chunk, std::size_t tile, const std::uint8_t* tables, float factor, float* const* sums, bool add,
           const Next& next) const;
  // Fetches the codes of such a call early, if they are in strips.
  void Fetch(const Chunk& chunk, std::size_t tile) const;

  // The same inputs of the next tile; after the last one, the next inputs.
  Next NextTile(const Chunk& chunk, std::size_t tile) const {
    if (tile + 1 < tiles_.size()) return {tile + 1, chunk.first_block};
    const std::size_t beyond = chunk.first_block + chunk.blocks;
    return {0, beyond < tap_blocks_ ? beyond : 0};
  }

  // Whether codes are read where they are stored: outputs apart, all inputs of 64 of them together. A copy has the
  // inputs of a chunk together.
  bool in_strips() const { return strip_bytes_ > 0; }

  // Brings sums that are complete to the order of outputs.
  void Sort(float* sums, std::size_t sets) const {
    if (strip_bytes_ > 0) kernels_->sort_rows(sums, sets);
  }

  const std::vector<Tile>& tiles() const { return tiles_; }
  const Class& tap_class(std::size_t index) const { return classes_[index]; }
  // Each set's tap, and the number of its first output.
  struct Set {
    std::size_t tap, output;
  };
  const std::vector<Set>& sets() const { return sets_; }
  std::size_t padded_outputs() const { return padded_outputs_; }
  const float* scales() const { return scales_; }

  // Whether their error is small, or any will do, and the instruction set is one in which they can pay.
  bool Allowed(bool any_error) const;

  std::size_t width() const { return width_; }

 private:
  struct Form;
  Lookup(const Weight& weight, const Form& form, const std::uint8_t* codes, const std::vector<std::size_t>& tap_class,
         const Kernels& kernels);
  void PackCodebooks(const Coded& m);
  void PackCodes(const Coded& m, std::size_t groups);  // of a row
  template <class Use>
  void CopyCodes(const Coded& m, std::size_t groups, Use use);
  void SumStrips(const Chunk& chunk, std::size_t tile, const std::uint8_t* tables, float factor, float* const* sums,
                 bool add, const Next& next) const;
  const std::uint8_t* Strip(const std::uint8_t* stored, std::size_t stage, std::size_t set) const;
  std::size_t Line(std::size_t set, std::size_t block) const;  // within its strip

  const Kernels* kernels_;
  std::size_t stages_, books_, width_, even_width_, outputs_, padded_outputs_;
  std::size_t tap_blocks_;    // of one tap
  std::size_t bits_;          // of a code as it is looked up
  std::size_t strip_bytes_;   // if codes are in strips, which are read where they are stored
  std::size_t chunk_blocks_;  // most of a chunk
  std::vector<Set> sets_;
  std::vector<Tile> tiles_;
  std::vector<Class> classes_;
  std::vector<std::uint8_t, OnLine<std::uint8_t>> codes_;               // if not; and 16 KB that may be fetched early
  std::vector<std::vector<std::int16_t, OnLine<std::int16_t>>> words_;  // [stages * books]
  std::vector<const std::int16_t*> block_words_;                        // [stages][tap_blocks]
  const float* scales_;
  double word_scale_ = 1.0, longest_word_ = 0.0;  // what words are rounded with, and their greatest length then
  float most_length_ = 0.0F;                      // that a rounded block of inputs may have
  float worth_ = 0.0F;                            // of a unit of a table, were the inputs not scaled
  double error_ = 0.0;                            // the relative one that is to be expected of inputs that are alike
};

}  // namespace vqonnx

#endif  // VQONNX_LOOKUP_H_
