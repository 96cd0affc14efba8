"""Reference applications and the demo."""
