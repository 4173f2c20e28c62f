"""The fraud model: transactions, features, networks, training, evaluation, simulator.

Pure computation: nothing here knows Kafka, Redis or the running pipeline.
"""
