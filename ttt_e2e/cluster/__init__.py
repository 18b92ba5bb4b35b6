"""Processes that meet and agree; the mesh of their devices, and where arrays live on it."""
