"""GPU kernels and their torch twins: tensors in, tensors out. Knows no plan and no scheduler."""
