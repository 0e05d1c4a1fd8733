"""Ways of moving bytes between processes. `base.py` is the contract, `registry.py` finds the implementations."""
