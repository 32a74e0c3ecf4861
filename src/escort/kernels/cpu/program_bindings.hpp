// Offers programs and the operations between convolutions to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace escort {

void bind_program(nanobind::module_& m);

}  // namespace escort
