"""Experiments over many training runs: matrices of cells, their statistics, their reports."""
