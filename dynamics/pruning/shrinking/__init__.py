"""Removing silenced filters: what can be cut without changing what a network computes, and the smaller network."""
