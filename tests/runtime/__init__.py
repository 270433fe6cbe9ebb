"""Tests of the runtime that apps embed."""
