"""Objectives against vectors that were computed elsewhere, by autograd and by closed form: `python -m tests.oracles FILE`.

`vectors.json` is a copy of the cases that can be evaluated now; the command takes any file of the same format.
"""
