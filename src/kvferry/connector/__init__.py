"""Connectors: what ties an inference engine to kvferry. Each engine is imported by its own package only."""
