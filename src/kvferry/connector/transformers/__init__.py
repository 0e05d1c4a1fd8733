"""The embedded engine: Hugging Face transformers over paged KV blocks, on CPU or one GPU.

    without torch                            with torch
    pool.py        block ids                 model.py      weights, tokenizer, fingerprint
    sequence.py    one answer's state        memory.py     the KV arena and its layout
    params.py      sampling parameters       cache.py      the transformers Cache over that arena
    scheduler.py   who runs next             attention.py  rows of different lengths in one pass
    detokenizer.py, stopping.py   text       runner.py     forward passes
    handoffs.py    insert, drop_select       sampling.py, answer.py   logits to tokens to text
    legs.py        how requests follow them  engine.py     schedule, run, postprocess
    openai/        bodies in and out         instance.py   all of it as one process

**Numbers do not depend on company.** A request's floating-point results are the same bits whether it runs alone or
with others, with or without a prefix hit, here or over a handoff:

- the prompt but its last token is computed in chunks of one size, on a fixed grid, padded to that size;
- the last prompt token and every generated one run in passes of one token with a fixed number of rows, empty ones
  included; each row's attention runs by itself (whether rows are independent here is tried at the start);
- only blocks that chunks computed are found by prefix, so not those of answers.

Both sides of a handoff need the same chunk size, number of rows and number of threads for that, and the same kind of
processor; without them, answers are as right, but not bit for bit.

Importing this package imports neither torch nor transformers.
"""
