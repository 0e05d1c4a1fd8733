"""The catalogue of faults: broken clusters set up for real, and what the doctor must say of each."""
