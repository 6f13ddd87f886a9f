"""What a network consists of: layers of parameters, as vectors in blocks; masks, identities of units, structure."""
