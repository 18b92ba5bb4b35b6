"""The processes of a run: how they start, meet and agree; the mesh of their devices, and the sharding of arrays."""
