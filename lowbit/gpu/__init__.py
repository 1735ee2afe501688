"""CUDA kernels from Python: compiled when needed, launched through the driver."""
