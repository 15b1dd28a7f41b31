// The Python module `kernel` of what EMULATED_MODULE lists, for NumPy (see module.h), and of the emulator's counters.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "execution.h"
#include "module.h"

namespace py = pybind11;
using namespace slowfast_ext::emulator;

namespace {

Value from_python(const py::handle& object) {
  if (object.is_none()) return Array();
  if (py::isinstance<py::array>(object)) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    return Array(const_cast<void*>(array.data()), array.writeable(), array.itemsize(),
                 {array.shape(), array.shape() + array.ndim()}, {array.strides(), array.strides() + array.ndim()});
  }
  if (py::isinstance<py::bool_>(object)) return py::cast<bool>(object);
  if (py::isinstance<py::float_>(object)) return py::cast<double>(object);
  if (py::isinstance<py::str>(object)) return py::cast<std::string>(object);
  if (py::isinstance<py::tuple>(object)) {
    std::vector<int64_t> numbers;
    for (const py::handle number : py::reinterpret_borrow<py::tuple>(object))
      numbers.push_back(py::cast<int64_t>(number));
    return numbers;
  }
  return py::cast<int64_t>(object);
}

py::object to_python(const Value& value) {
  if (const auto* truth = std::get_if<bool>(&value)) return py::bool_(*truth);
  if (const auto* text = std::get_if<std::string>(&value)) return py::str(*text);
  return py::int_(std::get<int64_t>(value));
}

// Since the last call: of each launch noted, where the kernel lies in the library, threads and bytes of shared memory.
py::list take_launches() {
  py::list list;
  for (const Launch& launch : launches()) {
    Dl_info library{};
    dladdr(launch.kernel, &library);
    const auto offset = static_cast<const char*>(launch.kernel) - static_cast<const char*>(library.dli_fbase);
    list.append(py::make_tuple(offset, launch.threads, launch.shared_bytes));
  }
  launches().clear();
  return list;
}

}  // namespace

PYBIND11_MODULE(kernel, module) {
  Module functions;
  define(functions);
  if (define_traffic) define_traffic(functions);
  for (const auto& [name, function] : functions.functions) {
    module.def(name, [function = function](const py::args& arguments) -> py::object {
      Values values;
      for (const py::handle argument : arguments) values.push_back(from_python(argument));
      const Values results = function(values);
      if (results.empty()) return py::none();
      if (results.size() == 1) return to_python(results[0]);
      py::tuple tuple(results.size());
      for (size_t i = 0; i < results.size(); ++i) tuple[i] = to_python(results[i]);
      return tuple;
    });
  }
  module.def("take_launches", &take_launches);
  module.def("statistics", [] { return py::make_tuple(statistics().ldmatrix, statistics().bank_conflicts); });
}
