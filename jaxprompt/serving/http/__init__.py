"""The HTTP interface: routes, their schemas, keys, limits, metrics. README.md lists the routes.

Nothing here touches JAX. What is computed goes through the batcher.
"""
