"""What a GPU makes of the library: tests on the device, times of the kernels and of whole steps."""
