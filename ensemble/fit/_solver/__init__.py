"""Weights on the simplex of least log-loss: the true-class probabilities go in, weights with a certificate come out."""
