"""Flexible split: what a plan can do if tokens are divided over replicas as the load at hand wants.

The smallest possible maximum GPU load of a plan is the maximum, over sets of GPUs, of the load of
the experts whose replicas are all in the set, divided by its size: the dual of the linear program
that `shares` solves. It is a value for a plan, and `search` makes plans for it.
"""
