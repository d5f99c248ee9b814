"""This program's own GPU kernels, in Triton. Each is behind one function, with plain torch of the same meaning beside
it: that runs wherever the kernel cannot."""
