// Checks before every step whether everything that a loan depends on is unchanged.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

namespace fastdiff {

namespace py = pybind11;

// Many "this attribute is still that object" checks at once. They run before every step of a
// network with lent weights, when the objects have long left the caches, so they must touch little
// memory.
class Watch {
 public:
  // items: (dict, key, value), where None also stands for a missing key;
  // objects: each must keep its class; sizes: dicts that must keep their number of keys.
  Watch(std::vector<std::tuple<py::dict, py::object, py::object>> items,
        std::vector<py::object> objects, std::vector<py::dict> dicts)
      : items_(std::move(items)), dicts_(std::move(dicts)) {
    for (py::object& object : objects) {
      PyTypeObject* type = Py_TYPE(object.ptr());
      types_.emplace_back(std::move(object), type);
    }
    for (const py::dict& dict : dicts_) sizes_.push_back(PyDict_Size(dict.ptr()));
  }

  bool intact() const {
    if (cleared_) return false;
    for (const auto& [dict, key, value] : items_) {
      // keys are strings, whose hashes never fail; PyDict_GetItem would save and restore errors
      PyObject* now = PyDict_GetItemWithError(dict.ptr(), key.ptr());
      if ((now ? now : Py_None) != value.ptr()) return false;
    }
    for (const auto& [object, type] : types_)
      if (Py_TYPE(object.ptr()) != type) return false;
    for (size_t i = 0; i < dicts_.size(); ++i)
      if (PyDict_Size(dicts_[i].ptr()) != sizes_[i]) return false;
    return true;
  }

  // The references, for Python's garbage collector: the watched modules lead back to this object.
  int traverse(visitproc visit, void* arg) const {
    for (const auto& [dict, key, value] : items_) {
      Py_VISIT(dict.ptr());
      Py_VISIT(key.ptr());
      Py_VISIT(value.ptr());
    }
    for (const auto& [object, type] : types_) Py_VISIT(object.ptr());
    for (const py::dict& dict : dicts_) Py_VISIT(dict.ptr());
    return 0;
  }
  void clear() {  // empty the members first: code run by the last reference may read them
    cleared_ = true;
    const auto items = std::exchange(items_, {});
    const auto types = std::exchange(types_, {});
    const auto dicts = std::exchange(dicts_, {});
  }

  // Visits the references for the collector.
  static void collected(PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const Watch* watch = made(self);
      return watch ? watch->traverse(visit, arg) : 0;
    };
    type.tp_clear = [](PyObject* self) {
      if (Watch* watch = made(self)) watch->clear();
      return 0;
    };
  }

 private:
  // The watch in its Python object; null before __init__ and after it failed.
  static Watch* made(PyObject* self) {
    const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return held.holder_constructed() ? held.value_ptr<Watch>() : nullptr;
  }

  std::vector<std::tuple<py::dict, py::object, py::object>> items_;
  std::vector<std::pair<py::object, PyTypeObject*>> types_;
  std::vector<py::dict> dicts_;
  std::vector<Py_ssize_t> sizes_;
  bool cleared_ = false;
};

}  // namespace fastdiff
