// What both halves of the bindings share. Addresses are integers; problems are tables of the header's
// structs, which Python writes eight bytes a field.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tucker_kernels.h"

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What a status says.
using Words = const char*(tk_status);

// Turns a status other than success into an exception.
inline void check(tk_status status, const char* what, Words* words = tk_status_string) {
  if (status != TK_OK) throw std::runtime_error(std::string(what) + ": " + words(status));
}

// How Python gives an argument of a C function, and back: addresses and enumerators are integers.
template <class A>
using Given =
    std::conditional_t<std::is_pointer_v<A>, uintptr_t, std::conditional_t<std::is_enum_v<A>, int, A>>;

template <class A>
A taken(Given<A> given) {
  if constexpr (std::is_pointer_v<A>)
    return reinterpret_cast<A>(given);
  else
    return static_cast<A>(given);
}

// Binds a function as the header declares it, argument by argument; it runs without the interpreter's lock.
template <class... A>
void bind(pybind11::module_& m, const std::string& name, tk_status (*function)(A...),
          Words* words = tk_status_string) {
  m.def(name.c_str(), [=](Given<A>... given) {
    pybind11::gil_scoped_release release;
    check(function(taken<A>(given)...), name.c_str(), words);
  });
}
