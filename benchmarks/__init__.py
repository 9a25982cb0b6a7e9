"""Benchmarks: ``pytest benchmarks``; see README.md here."""
