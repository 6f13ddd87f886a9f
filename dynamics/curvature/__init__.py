"""Exact derivatives of a loss around fixed parameters: pure functions that know no training and no file.

``expansion.py`` has gradients and Hessian products of any loss that autograd differentiates twice, ``gates.py`` only
their inner products by layer, at the least cost. The other files are what these two stand on: operations of which more
is known than autograd's own derivatives.
"""
