"""A soak of one real server on the CPU: load of every kind, then what must be as before (docs/reliability.md)."""
