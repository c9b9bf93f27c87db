"""Runs on real models and real text, as a user starts them."""
