"""Tests that take minutes: what an issue promises, held on real models."""
