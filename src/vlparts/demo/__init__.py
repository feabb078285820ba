"""The demo: a small model learns, from nothing, to say where a digit is."""
