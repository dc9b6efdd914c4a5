"""Devices: where the leaves lie on a mesh, and sums over its axes.

In: leaves, and what the user says of the mesh (`axis_name=`, `specs=`).
Out: the placement of each leaf, sums and maxima over the devices that share it, and one
call of the host for all devices.
May import: `_trees`.
"""
