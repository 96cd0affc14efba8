"""One foreign registry per package: models are taken over from it, and nothing is served from it."""
