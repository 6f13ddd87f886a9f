"""Exact derivatives of a loss around fixed parameters: pure functions that know of no training loop and no files.

``expansion.py`` computes gradients and Hessian products of any loss that autograd differentiates twice; ``gates.py``
computes only their inner products by layer, at the least cost. The other files support these two: operations with
better derivatives than autograd's own.
"""
