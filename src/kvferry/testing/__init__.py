"""For those who write transports: the conformance suite, processes to test against, faults to inject, leak checks.

`conformance.py` needs pytest. Nothing in kvferry's other rooms imports this one.
"""
