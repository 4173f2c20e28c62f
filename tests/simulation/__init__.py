"""Simulated faults: the worker on a broker and a store that fail as a seed says.

    python -m tests.simulation --seeds 100000           runs, until one finds something wrong
    python -m tests.simulation --seed 4711              one run again, with every step of it

See docs/simulation.md.
"""
