"""Evaluates a user's objective at other parameters, from the same moment, without changing anything."""
