"""What a network is: layers of parameters, as vectors in blocks; its masks, its units' identities, its structure."""
