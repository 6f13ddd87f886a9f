"""Theory against measurement."""
