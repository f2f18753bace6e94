"""The composition testbed: every policy draws the same sets of adapters, and one judge counts what arrived.

python -m benchmarks.composition [--rows id,...] [--quick]; resumable: what was drawn and judged is not done again.
"""
