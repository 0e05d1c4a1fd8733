"""kvferry: a distributed KV cache for LLM serving. ARCHITECTURE.md has the life of a request and the rooms."""

__version__ = "0.1.0"
