"""Simulated faults: the worker on a broker and a store whose failures a seed decides.

    python -m tests.simulation --seeds 100000           run seeds until one fails
    python -m tests.simulation --seed 4711              replay one run and print every step

See docs/simulation.md.
"""
