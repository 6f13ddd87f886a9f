"""A network without its silenced filters: what can be taken away unchanged, and the smaller network."""
