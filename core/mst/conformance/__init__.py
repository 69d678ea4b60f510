"""The conformance kit: run every promise of `mst.hookspecs` on one backend, and report it.

`mst backend check NAME` runs it, and so does `MST_BACKEND=NAME pytest --pyargs mst.conformance`.
Each check is a function from a `Context` to a `Finding`; `mst.conformance.checks` lists them all.
"""
