"""`kvferry bench transfer`: the engine beside other systems and beside what the machine can do at most."""
