"""One file per command; each has `add(app)`, which registers it."""
