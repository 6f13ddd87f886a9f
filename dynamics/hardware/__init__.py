"""What a device asks for: full precision, its order of memory, CUDA graphs, and sums that come out the same again."""
