"""Service -> backend: one file a policy."""
