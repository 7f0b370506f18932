#pragma once

namespace p2s {

// Whether work is shared out by the OpenMP runtime that the process holds; by threads of our own otherwise.
bool openmp_used();

// False makes this process share work out by threads of our own.
void openmp_allow(bool allowed);

}  // namespace p2s
