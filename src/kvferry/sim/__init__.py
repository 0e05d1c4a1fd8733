"""The protocol under a virtual clock: seeded clusters with faults, and invariants checked after each step."""
