"""The handoff as state machines without I/O: an event and the time go in, a list of actions comes out.

Read in this order: `messages` (what the two sides say), `events` (what happens and what is to be done), `lease`,
`source`, `target`; `records` and `tables` are what these two keep. `membership` is what instances tell the router.
"""
