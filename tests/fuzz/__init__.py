"""Input that attacks: a fuzzer of every decoder, ``python -m tests.fuzz`` (``make fuzz``).

targets.py    what is fuzzed, with its seeds and what it may raise
mutation.py   inputs made from others, that know JSON, states and safetensors
guard.py      runs inputs one by one: findings, memory, progress
corpus/       inputs that found something; ``make test`` replays them
"""
