"""CUDA C++ kernels for experts and their CuPy launchers. CuPy is imported only when one is used."""
