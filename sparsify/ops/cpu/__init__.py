"""The C++ kernels: `build` compiles those of this processor once, `kernels` calls them; sources in `src/`."""
