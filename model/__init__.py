"""The fraud model: transactions, features, networks, training, evaluation, simulator.

It only computes: no module imports Kafka, Redis or the running pipeline.
"""
