// How a kernel is bound without pybind11, which takes as long to compile as the kernel: functions of what NumPy and
// Python pass, listed by EMULATED_MODULE. binding.cpp, compiled once and linked to each, makes them a Python module.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace slowfast_ext::emulator {

// A NumPy array, or None. Sizes and strides are those of NumPy: strides count bytes.
class Array {
 public:
  Array() = default;
  Array(void* data, bool writeable, int64_t itemsize, std::vector<int64_t> shape, std::vector<int64_t> strides)
      : data_(data),
        writeable_(writeable),
        itemsize_(itemsize),
        shape_(std::move(shape)),
        strides_(std::move(strides)) {
    none_ = false;
  }

  bool is_none() const { return none_; }
  const void* data() const { return data_; }
  void* mutable_data() const {
    if (!writeable_) throw std::invalid_argument("an array for results must be writeable, got one that is not");
    return data_;
  }
  int64_t itemsize() const { return itemsize_; }
  int64_t shape(int dimension) const { return shape_.at(dimension); }
  int64_t strides(int dimension) const { return strides_.at(dimension); }
  int64_t bytes() const {  // of an array that is dense
    int64_t bytes = itemsize_;
    for (const int64_t size : shape_) bytes *= size;
    return bytes;
  }

 private:
  void* data_ = nullptr;
  bool none_ = true, writeable_ = false;
  int64_t itemsize_ = 0;
  std::vector<int64_t> shape_, strides_;
};

using Value = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>, Array>;
using Values = std::vector<Value>;

template <typename T>
struct Conversion {  // of whole numbers
  static T from(const Value& value) { return static_cast<T>(std::get<int64_t>(value)); }
  static void append(Values& values, T result) { values.emplace_back(static_cast<int64_t>(result)); }
};

template <>
struct Conversion<bool> {
  static bool from(const Value& value) { return std::get<bool>(value); }
  static void append(Values& values, bool result) { values.emplace_back(result); }
};

template <>
struct Conversion<float> {
  static float from(const Value& value) { return static_cast<float>(std::get<double>(value)); }
};

template <>
struct Conversion<std::string> {
  static const std::string& from(const Value& value) { return std::get<std::string>(value); }
  static void append(Values& values, std::string result) { values.emplace_back(std::move(result)); }
};

template <>
struct Conversion<Array> {
  static const Array& from(const Value& value) { return std::get<Array>(value); }
};

template <typename T, size_t kSize>
struct Conversion<std::array<T, kSize>> {
  static std::array<T, kSize> from(const Value& value) {
    const auto& list = std::get<std::vector<int64_t>>(value);
    if (list.size() != kSize) throw std::bad_variant_access();
    std::array<T, kSize> array;
    for (size_t i = 0; i < kSize; ++i) array[i] = static_cast<T>(list[i]);
    return array;
  }
};

template <typename First, typename Second>
struct Conversion<std::pair<First, Second>> {
  static void append(Values& values, const std::pair<First, Second>& result) {
    Conversion<First>::append(values, result.first);
    Conversion<Second>::append(values, result.second);
  }
};

// The functions of a module; each takes positional arguments and gives none, one or a tuple of results.
class Module {
 public:
  using Function = std::function<Values(const Values&)>;

  template <typename Result, typename... Parameters>
  void def(const char* name, Result (*function)(Parameters...)) {
    functions.emplace_back(name, [=](const Values& arguments) {
      if (arguments.size() != sizeof...(Parameters)) {
        throw std::invalid_argument(std::string(name) + ": the number of arguments must be " +
                                    std::to_string(sizeof...(Parameters)) + ", got " +
                                    std::to_string(arguments.size()));
      }
      return call(name, function, arguments, std::index_sequence_for<Parameters...>());
    });
  }

  std::vector<std::pair<const char*, Function>> functions;

 private:
  template <typename Result, typename... Parameters, size_t... kIndices>
  static Values call(const char* name, Result (*function)(Parameters...), const Values& arguments,
                     std::index_sequence<kIndices...>) {
    size_t index = 0;
    [[maybe_unused]] const auto convert = [&](auto type, size_t i) -> decltype(auto) {
      index = i;
      return decltype(type)::from(arguments[i]);
    };
    Values results;
    try {
      std::tuple<std::decay_t<Parameters>...> converted{convert(Conversion<std::decay_t<Parameters>>(), kIndices)...};
      if constexpr (std::is_void_v<Result>) {
        std::apply(function, converted);
      } else {
        Conversion<Result>::append(results, std::apply(function, converted));
      }
    } catch (const std::bad_variant_access&) {
      throw std::invalid_argument(std::string(name) + ": argument " + std::to_string(index + 1) +
                                  " must be of the type that the C++ function takes, got another");
    }
    return results;
  }
};

void define(Module& module);                                // by EMULATED_MODULE, once a library
__attribute__((weak)) void define_traffic(Module& module);  // by traffic.cpp, where it is linked

}  // namespace slowfast_ext::emulator

#define EMULATED_MODULE(module) void slowfast_ext::emulator::define(slowfast_ext::emulator::Module& module)
