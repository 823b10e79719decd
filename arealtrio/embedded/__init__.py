"""An inference server in a box: real HTTP, continuous batching, a tiny real model.

It is small enough to start in a test and to run four of on a laptop, and it keeps the promises of
the servers it stands in for: the same routes, fields, errors, pause modes and version spans.
"""
