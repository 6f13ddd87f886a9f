"""Importance measures: what they look at, gathered from data that streams by, and the scores they make of it."""
