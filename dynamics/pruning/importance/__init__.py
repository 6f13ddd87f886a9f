"""Importance measures: what they need, gathered from streamed data, and the scores computed from it."""
