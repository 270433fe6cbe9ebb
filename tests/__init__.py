"""Tests of edgepipe; the folders mirror the package's."""
