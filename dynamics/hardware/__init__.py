"""What a device needs: full precision, its memory order, CUDA graphs, and reproducible sums."""
