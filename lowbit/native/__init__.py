"""What runs as C++: the printer of rules, the arithmetic that CPU and CUDA kernels share, and the CPU library."""
