"""Fuzzer of every decoder: ``python -m tests.fuzz`` (``make fuzz``).

targets.py    the decoders with their seeds and the errors that they may raise
mutation.py   mutations of bytes, JSON, states and safetensors files
guard.py      runs inputs one by one; limits memory, keeps findings, shows progress
corpus/       inputs that once found something; ``make test`` replays them
"""
