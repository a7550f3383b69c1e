"""The demonstration: a small model, a real server and two requests."""
