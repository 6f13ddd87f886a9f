"""Evaluating a user's objective without a trace: on other parameters, from the same moment, and nothing is changed."""
