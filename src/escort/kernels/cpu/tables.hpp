// The structs of direct.hpp as numpy describes them, and numpy's arrays of records as tables of these structs.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "depthwise.hpp"
#include "direct.hpp"
#include "memory.hpp"

namespace escort {

struct Field {
  const char* name;
  const char* type;  // as numpy writes it
  size_t offset;
};

template <class T>
constexpr const char* type_of() {
  if constexpr (std::is_same_v<T, float>) return "f4";
  if constexpr (std::is_same_v<T, int64_t>) return "i8";
  static_assert(sizeof(T) == 4 || std::is_same_v<T, int64_t>, "a number of 32 bits, or an int64_t");
  return "i4";
}

// Fields<T>::list holds the fields of T in their order.
template <class Struct>
struct Fields;

#define ESCORT_FIELD(field) {#field, type_of<decltype(T::field)>(), offsetof(T, field)}

template <>
struct Fields<Nonzero> {
  using T = Nonzero;
  static constexpr Field list[] = {ESCORT_FIELD(offset), ESCORT_FIELD(value)};
};

template <>
struct Fields<OutChannel> {
  using T = OutChannel;
  static constexpr Field list[] = {ESCORT_FIELD(channel), ESCORT_FIELD(slot), ESCORT_FIELD(first_nonzero),
                                   ESCORT_FIELD(bias), ESCORT_FIELD(slope)};
};

template <>
struct Fields<Block> {
  using T = Block;
  static constexpr Field list[] = {ESCORT_FIELD(first_channel), ESCORT_FIELD(end_channel), ESCORT_FIELD(first_record),
                                   ESCORT_FIELD(end_record)};
};

template <>
struct Fields<Run> {
  using T = Run;
  static constexpr Field list[] = {ESCORT_FIELD(stage_position), ESCORT_FIELD(plane_position), ESCORT_FIELD(count),
                                   ESCORT_FIELD(plane_step),     ESCORT_FIELD(lanes),          ESCORT_FIELD(more_lanes),
                                   ESCORT_FIELD(joins)};
};

template <>
struct Fields<Segment> {
  using T = Segment;
  static constexpr Field list[] = {ESCORT_FIELD(plane_position), ESCORT_FIELD(tile_position), ESCORT_FIELD(length)};
};

template <>
struct Fields<Tile> {
  using T = Tile;
  static constexpr Field list[] = {ESCORT_FIELD(x_start),       ESCORT_FIELD(first_run),   ESCORT_FIELD(end_run),
                                   ESCORT_FIELD(first_segment), ESCORT_FIELD(end_segment), ESCORT_FIELD(y_start),
                                   ESCORT_FIELD(length),        ESCORT_FIELD(vectors)};
};

template <>
struct Fields<Params> {
  using T = Params;
  static constexpr Field list[] = {
      ESCORT_FIELD(stage_size),     ESCORT_FIELD(partial_size),    ESCORT_FIELD(x_sample_stride),
      ESCORT_FIELD(x_plane_stride), ESCORT_FIELD(y_sample_stride), ESCORT_FIELD(y_plane_stride),
      ESCORT_FIELD(column_stride),  ESCORT_FIELD(channel_stride),  ESCORT_FIELD(in_place),
      ESCORT_FIELD(parts),          ESCORT_FIELD(blocks_of_part),  ESCORT_FIELD(channels),
      ESCORT_FIELD(alike),          ESCORT_FIELD(activation)};
};

template <>
struct Fields<Phase> {
  using T = Phase;
  static constexpr Field list[] = {ESCORT_FIELD(position), ESCORT_FIELD(first_column), ESCORT_FIELD(length)};
};

template <>
struct Fields<DepthwiseParams> {
  using T = DepthwiseParams;
  static constexpr Field list[] = {ESCORT_FIELD(channels),     ESCORT_FIELD(multiplier),     ESCORT_FIELD(height),
                                   ESCORT_FIELD(width),        ESCORT_FIELD(out_height),     ESCORT_FIELD(out_width),
                                   ESCORT_FIELD(kernel_rows),  ESCORT_FIELD(kernel_columns), ESCORT_FIELD(row_stride),
                                   ESCORT_FIELD(row_dilation), ESCORT_FIELD(column_stride),  ESCORT_FIELD(top),
                                   ESCORT_FIELD(pitch),        ESCORT_FIELD(stage_size),     ESCORT_FIELD(bands),
                                   ESCORT_FIELD(block_rows),   ESCORT_FIELD(planes),         ESCORT_FIELD(activation)};
};

#undef ESCORT_FIELD

// The dtype whose records lie in memory as T does.
template <class T>
nanobind::object dtype_of() {
  nanobind::list names, formats, offsets;
  for (const Field& field : Fields<T>::list) {
    names.append(field.name);
    formats.append(field.type);
    offsets.append(field.offset);
  }
  nanobind::dict dtype;
  dtype["names"] = names;
  dtype["formats"] = formats;
  dtype["offsets"] = offsets;
  dtype["itemsize"] = sizeof(T);
  return nanobind::module_::import_("numpy").attr("dtype")(dtype);
}

// The table of that name, an array of records of shape (n,), as structs. Raises TypeError where names,
// types or places of its fields are not those of T.
template <class T>
Table<T> records(const nanobind::dict& tables, const char* name) {
  using Bytes = nanobind::ndarray<const uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
  const nanobind::object array = tables[name], expected = dtype_of<T>();
  if (!array.attr("dtype").equal(expected)) {
    const std::string message = std::string(name) + " are records of " + nanobind::str(expected).c_str();
    throw nanobind::type_error(message.c_str());
  }
  const auto bytes = nanobind::cast<Bytes>(array.attr("view")("u1"));
  Table<T> result(bytes.size() / sizeof(T));
  if (!result.empty()) std::memcpy(result.data(), bytes.data(), bytes.size());
  return result;
}

// The table of that name, an array of plain numbers of shape (n,). Raises TypeError where they are of another type.
template <class T>
Table<T> numbers(const nanobind::dict& tables, const char* name) {
  using Numbers = nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
  const nanobind::object table = tables[name];
  Numbers array;
  if (!nanobind::try_cast<Numbers>(table, array, false)) {
    const std::string message = std::string(name) + " are a vector of " + type_of<T>();
    throw nanobind::type_error(message.c_str());
  }
  return Table<T>(array.data(), array.data() + array.size());
}

}  // namespace escort
