"""OpenAI's completion and chat API over one engine: bodies in (requests), bodies out (responses), the server (app)."""
