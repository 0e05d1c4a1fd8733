"""The OpenAI-compatible front: `app.Router` as a library, `kvferry router` as a process."""
